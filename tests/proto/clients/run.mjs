// What ctest calls: installs the pinned client libraries beside the build, then runs every *.test.mjs here with node's
// test runner. The source tree is not written to; an install that is there and fits the lock file is used again.
import { createHash } from "node:crypto";
import { spawnSync } from "node:child_process";
import fs from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";

const here = path.dirname(fileURLToPath(import.meta.url));
const bin = path.resolve(process.env.ERNEST_BIN ?? path.join(here, "../../../build/release/ernest"));
if (!fs.existsSync(bin)) {
  console.error(`${bin} is not there: build it, or name another one in ERNEST_BIN`);
  process.exit(1);
}

function install(dir) {
  const files = ["package.json", "package-lock.json", ".npmrc"];
  const hash = createHash("sha256");
  for (const name of files) hash.update(fs.readFileSync(path.join(here, name)));
  const want = hash.digest("hex");
  const stamp = path.join(dir, "installed");
  if (fs.existsSync(stamp) && fs.readFileSync(stamp, "utf8") === want) return;
  fs.rmSync(dir, { recursive: true, force: true });
  fs.mkdirSync(dir, { recursive: true });
  for (const name of files) fs.copyFileSync(path.join(here, name), path.join(dir, name));
  const done = spawnSync("npm", ["ci", "--no-audit", "--no-fund", "--ignore-scripts"], {
    cwd: dir,
    encoding: "utf8",
    timeout: 300_000,
  });
  if (done.status !== 0) {
    console.error(
      "cannot install the client libraries with npm; these tests need npm and its registry once:\n" +
        `${done.error ? done.error.message : done.stderr}`,
    );
    process.exit(1);
  }
  fs.writeFileSync(stamp, want);
}

const clients = path.join(path.dirname(bin), "clients");
install(clients);
const tests = fs.readdirSync(here).filter((name) => name.endsWith(".test.mjs"));
const done = spawnSync(process.execPath, ["--test", ...tests.map((name) => path.join(here, name))], {
  stdio: "inherit",
  env: { ...process.env, ERNEST_BIN: bin, ERNEST_CLIENTS: clients },
  timeout: 800_000,
});
process.exit(done.status ?? 1);
