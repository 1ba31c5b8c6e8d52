"""Find the ernest program and become it."""
import os
import shutil
import sys

# Folders, beside a checkout's python/, in which a build leaves the program; newest presets first.
BUILDS = ("build/release", "build/clang", "build/checks")


def find_program():
    """The path of ernest: ERNEST_BIN, else PATH, else the build folder of the checkout this file is in; else None."""
    named = os.environ.get("ERNEST_BIN")
    if named:
        return named if os.access(named, os.X_OK) and not os.path.isdir(named) else None
    found = shutil.which("ernest")
    if found:
        return found
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for build in BUILDS:
        path = os.path.join(root, build, "ernest")
        if os.access(path, os.X_OK):
            return path
    return None


def become(words):
    """Replace this process by `ernest <words>`: signals, exit code and output are then ernest's own."""
    program = find_program()
    if program is None:
        named = os.environ.get("ERNEST_BIN")
        why = f"ERNEST_BIN={named} is no program" if named else "it is not on PATH and not built here"
        print(f"fastdeploy: cannot find ernest: {why}; run make, or set ERNEST_BIN to it", file=sys.stderr)
        sys.exit(2)
    sys.stdout.flush()
    os.execv(program, ["ernest", *words])


def serve(words):
    """`ernest serve` with FastDeploy's default address: all of this machine's. A --host flag or a line of the --config
    file wins over the variable; ernest itself warns when it is open and no key is set."""
    os.environ.setdefault("ERNEST_HOST", "0.0.0.0")
    become(["serve", *words])


def command():
    """The `fastdeploy` command: serve as above, everything else as ernest has it."""
    words = sys.argv[1:]
    if words[:1] == ["serve"]:
        serve(words[1:])
    become(words)
