#!/usr/bin/env python3
"""Check that every #include in src/ obeys the layering of docs/guide.md, and that getenv stays in main.c and cli.

A room may include its own files, base, and the doors of the rooms it stands on. A door is <room>/<room>.h, for model
also model/sample.h and model/quant.h, for backend also backend/bench.h. backend/cuda has no door: it is a plugin, loaded
by name, and what it shows is in backend/plugin.h. Prints one line per offence; exit code 1 when
there is any.
Usage: check_layers.py [SRC]      check_layers.py --self-test
"""
import os
import re
import sys
import tempfile

# room: rooms whose doors it may open (base is open to all, whole)
BELOW = {
    "base": [],
    "text": [],
    "model": [],
    "backend": ["model"],
    "backend/ref": ["model", "backend"],
    "backend/cpu": ["model", "backend"],
    "backend/cuda": ["model", "backend"],
    "engine": ["model", "backend"],
    "server": ["text", "model", "backend", "engine"],
    "cli": ["text", "model", "backend", "engine", "server"],
    "main": ["cli"],
}
DOORS = {room: [f"{room}/{room}.h"] for room in BELOW if "/" not in room and room not in ("base", "main")}
DOORS["model"] += ["model/sample.h", "model/quant.h"]
DOORS["backend"] += ["backend/bench.h"]
# The backend's own door file opens the implementations that are in the program, by their door headers; the one that is
# not opens the header that it shares with the loader.
INNER_DOORS = {"backend": ["backend/ref/ref.h", "backend/cpu/cpu.h"], "backend/cuda": ["backend/plugin.h"]}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
ENVIRONMENT = re.compile(r"\b(secure_)?getenv\s*\(|\b(__)?environ\b")


def strip_comments(text):
    """The text without comments and string literals' insides; lines stay where they are."""
    def blank(match):
        found = match.group(0)
        if found.startswith("/"):
            return re.sub(r"[^\n]", " ", found)
        return found
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S)


def room_of(path):
    parts = path.split("/")
    if path == "main.c":
        return "main"
    if parts[0] == "backend" and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0]


def check_include(path, target, src):
    """None, or why path may not include target."""
    room = room_of(path)
    if not os.path.exists(os.path.join(src, target)):
        return f"no such file below src/ (includes are relative to src/, not to the file)"
    other = room_of(target)
    if other == room or other == "base" and room != "base":
        return None
    if target in INNER_DOORS.get(room, []):
        return None
    if other not in BELOW[room]:
        return f"{room} may not include {other}: it stands on {', '.join(['base'] + BELOW[room]) if room != 'base' else 'nothing'}"
    if target not in DOORS[other]:
        return f"{target} is private to {other}; its door is {' or '.join(DOORS[other])}"
    return None


def check_file(path, src):
    with open(os.path.join(src, path), encoding="utf-8") as f:
        text = strip_comments(f.read())
    room = room_of(path)
    if room not in BELOW:
        yield f"src/{path}: {room} is no room of the house; a new one needs a written reason in docs/guide.md"
        return
    for number, line in enumerate(text.split("\n"), 1):
        found = INCLUDE.match(line)
        if found and found.group(1) == '"':
            why = check_include(path, found.group(2), src)
            if why:
                yield f"src/{path}:{number}: {why}"
        code = re.sub(r'"(?:\\.|[^"\\])*"', '""', line)
        if ENVIRONMENT.search(code) and room not in ("main", "cli"):
            yield f"src/{path}:{number}: the environment is read in main.c and cli only"


def check_tree(src):
    """Every offence below src, and how many files were read."""
    offences, count, names = [], 0, {}
    for folder, folders, files in os.walk(src):
        folders.sort()
        for name in sorted(files):
            if not re.search(r"\.(c|h|cc|cu|cuh)$", name):
                continue
            path = os.path.relpath(os.path.join(folder, name), src)
            count += 1
            if name in names:
                offences.append(f"src/{path}: a file of that name is also at src/{names[name]}; names are unique")
            names[name] = path
            offences.extend(check_file(path, src))
    return offences, count


SELF_TEST = [  # path, text, how many offences
    ("base/a.h", "int a;", 0),
    ("base/b.c", '#include "model/model.h"', 1),
    ("model/model.h", '#include "base/a.h"\n#include <stdlib.h>', 0),
    ("model/sample.h", "", 0),
    ("model/inner.h", "", 0),
    ("model/m.c", '#include "model/inner.h"', 0),
    ("backend/backend.h", '#include "model/model.h"\n#include "model/sample.h"', 0),
    ("backend/ref/ref.h", '#include "backend/backend.h"', 0),
    ("backend/cpu/k.c", '#include "backend/ref/ref.h"', 1),
    ("backend/backend.c", '#include "backend/ref/ref.h"', 0),
    ("backend/bench.h", '#include "model/model.h"', 0),
    ("backend/plugin.h", '#include "backend/backend.h"', 0),
    ("backend/plugin.c", '#include "backend/plugin.h"\n#include "backend/cuda/cuda.h"', 1),
    ("backend/cpu/l.c", '#include "backend/plugin.h"', 1),
    ("backend/cuda/cuda.h", '#include "backend/backend.h"', 0),
    ("backend/cuda/cu_p.c", '#include "backend/plugin.h"\n#include "backend/cuda/cuda.h"', 0),
    ("backend/cuda/cu_k.cuh", '#include <cuda_bf16.h>\n#include "backend/cpu/l.c"', 1),
    ("backend/cuda/cu_k.cu", '#include "backend/cuda/cu_k.cuh"\n#include "model/inner.h"', 1),
    ("engine/g.c", '#include "backend/cuda/cuda.h"', 1),
    ("cli/p.c", '#include "backend/plugin.h"', 1),
    ("engine/engine.h", '#include "backend/backend.h"', 0),
    ("engine/e.c", '#include "model/inner.h"', 1),
    ("engine/f.c", '#include "backend/ref/ref.h"', 1),
    ("text/text.h", '#include "model/model.h"', 1),
    ("server/server.h", '#include "engine/engine.h"\n#include "text/text.h"', 0),
    ("server/s.c", 'char *x = getenv("A"); /* getenv("B") */', 1),
    ("cli/cli.h", '// #include "nowhere.h"\n#include "server/server.h"\n#include "backend/bench.h"', 0),
    ("cli/c.c", 'char *x = getenv("A");', 0),
    ("cli/d.c", '#include "a.h"', 1),
    ("main.c", '#include "cli/cli.h"', 0),
    ("attic/z.c", "", 1),
    ("cli/a.h", "", 1),
]


def self_test():
    with tempfile.TemporaryDirectory() as src:
        for path, text, _ in SELF_TEST:
            os.makedirs(os.path.dirname(os.path.join(src, path)) or src, exist_ok=True)
            with open(os.path.join(src, path), "w", encoding="utf-8") as f:
                f.write(text)
        offences, _ = check_tree(src)
    bad = 0
    for path, _, expected in SELF_TEST:
        found = [o for o in offences if o.startswith(f"src/{path}:")]
        if len(found) != expected:
            bad += 1
            print(f"self-test: {path}: expected {expected} offences, found {found}")
    print(f"check_layers self-test: {len(SELF_TEST) - bad} of {len(SELF_TEST)} cases right")
    return 1 if bad else 0


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    src = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "src")
    offences, count = check_tree(src)
    for line in offences:
        print(line)
    print(f"check_layers: {count} files, {len(offences)} offences")
    return 1 if offences or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
