import { describe, expect, it } from "vitest";
import { globMatcher } from "../src/glob.ts";
import { NO_SHELL } from "../src/tools.ts";
import { bytes, inSandbox } from "./support.ts";

const LINES = "one\ntwo\nthree\n";

describe("read", () => {
  it.each([
    [undefined, LINES],
    [[], LINES],
    [[1, 2], "one\ntwo"],
    [[2, 2], "two"],
    [[3, -1], "three\n"],
    [[0, 1], "one"],
    [[4, 9], ""],
    [[3, 1], ""],
  ])("takes the range %j", (range, text) =>
    inSandbox(async ({ call }) => {
      await call("write", { file_path: "f", content: LINES });
      expect(await call("read", { file_path: "f", view_range: range })).toBe(text);
    }),
  );

  it.each([
    [{ file_path: "" }, "Error: read: file_path is required"],
    [{ file_path: 7 }, "Error: read: file_path must be a string"],
    [{ file_path: "none" }, "Error: read: none: no such file or directory"],
    [{ file_path: "." }, "Error: read: . is not a regular file"],
    [{ file_path: "f/x" }, "Error: read: f/x: not a directory"],
    [{ file_path: "/etc/passwd" }, 'Error: path "/etc/passwd" is outside the session\'s working directory'],
    [{ file_path: "../../etc/passwd" }, 'Error: path "../../etc/passwd" is outside the session\'s working directory'],
    [{ file_path: "/workspacex" }, 'Error: path "/workspacex" is outside the session\'s working directory'],
    [{ file_path: "f", view_range: [1] }, "Error: read: view_range must be [start_line, end_line]"],
    [{ file_path: "f", view_range: ["1", "2"] }, "Error: read: view_range must be [start_line, end_line]"],
  ])("refuses %j", (input, error) =>
    inSandbox(async ({ call }) => {
      await call("write", { file_path: "f", content: LINES });
      expect(await call("read", input)).toBe(error);
    }),
  );

  it("shows a large file by ranges only, whatever its chunks", () =>
    inSandbox(async ({ call, files }) => {
      const lines = Array.from({ length: 40_000 }, (_, n) => `line ${n + 1} ${"x".repeat(40)}`);
      files.write("/workspace/large", bytes(lines.join("\n")));
      expect(await call("read", { file_path: "large" })).toContain("exceeds 262144-byte limit. Use the view_range");
      for (const [start, end] of [
        [1, 1],
        [19_000, 19_003],
        [39_999, -1],
        [40_000, 50_000],
      ] as const) {
        const expected = lines.slice(start - 1, end > 0 ? end : undefined).join("\n");
        expect(await call("read", { file_path: "large", view_range: [start, end] })).toBe(expected);
      }
      expect(await call("read", { file_path: "large", view_range: [1, 39_000] })).toContain("Narrow the view_range");
      files.write("/workspace/line", new Uint8Array(300 * 1024).fill(120));
      expect(await call("read", { file_path: "line", view_range: [1, 1] })).toContain("line 1 of line alone exceeds");
    }));
});

describe("write and edit", () => {
  it("say what they did, in bytes", () =>
    inSandbox(async ({ call }) => {
      expect(await call("write", { file_path: "a/ü", content: "ü$&\n" })).toBe("wrote 5 bytes to a/ü");
      expect(await call("edit", { file_path: "a/ü", old_string: "ü", new_string: "$&$1" })).toBe(
        "edited a/ü (1 replacement(s))",
      );
      expect(await call("read", { file_path: "a/ü" })).toBe("$&$1$&\n");
    }));

  it("an edit must be unique, or replace all", () =>
    inSandbox(async ({ call }) => {
      await call("write", { file_path: "f", content: "aXbXc" });
      const input = { file_path: "f", old_string: "X", new_string: "-" };
      expect(await call("edit", input)).toBe("Error: edit: old_string appears 2 times in f (must be unique)");
      expect(await call("edit", { ...input, replace_all: true })).toBe("edited f (2 replacement(s))");
      expect(await call("edit", input)).toBe("Error: edit: old_string not found in f");
      expect(await call("edit", { ...input, old_string: "" })).toBe("Error: edit: old_string is required");
      expect(await call("read", { file_path: "f" })).toBe("a-b-c");
    }));

  it("an edit leaves bytes that are no text alone", () =>
    inSandbox(async ({ call, files }) => {
      files.write("/workspace/f", Uint8Array.from([0x61, 0xff, 0x62]));
      expect(await call("edit", { file_path: "f", old_string: "a", new_string: "b" })).toContain(
        "not a UTF-8 text file",
      );
      expect(files.read("/workspace/f")).toEqual(Uint8Array.from([0x61, 0xff, 0x62]));
    }));

  it("nothing is written into a read-only mount, nor outside", () =>
    inSandbox(
      async ({ call, files }) => {
        files.write("/mnt/memory/shared/a", bytes("1"));
        expect(await call("write", { file_path: "/mnt/memory/shared/a", content: "2" })).toBe(
          "Error: write: /mnt/memory/shared/a is inside read-only directory /mnt/memory/shared",
        );
        expect(await call("edit", { file_path: "/mnt/memory/shared/a", old_string: "1", new_string: "2" })).toContain(
          "read-only",
        );
        expect(await call("read", { file_path: "/mnt/memory/shared/a" })).toBe("1");
        expect(await call("write", { file_path: "/mnt/memory/other", content: "2" })).toContain(
          "other permitted directories",
        );
      },
      { mounts: [{ root: "/mnt/memory/shared", isReadOnly: true }] },
    ));
});

describe("globMatcher", () => {
  it("refuses more work than a search may take", () => {
    const matches = globMatcher("?".repeat(999));
    const search = () => {
      for (let file = 0; file < 1000; file += 1) matches("x".repeat(1000));
    };
    expect(search).toThrow("too much work for so many files: narrow the pattern or the path");
  });
});

describe("glob", () => {
  const NAMES = [
    "a.ts",
    "b.tsx",
    "src/a.ts",
    "src/deep/c.ts",
    "src/deep/[x].md",
    "node_modules/m.ts",
    ".git/config",
    ".hidden/h.ts",
  ];

  it.each([
    ["*.ts", ["a.ts"]],
    ["**/*.ts", ["a.ts", "src/a.ts", "src/deep/c.ts"]],
    ["src/**", ["src/a.ts", "src/deep/[x].md", "src/deep/c.ts"]],
    ["src/*/*.ts", ["src/deep/c.ts"]],
    ["*.{ts,tsx}", ["a.ts", "b.tsx"]],
    ["{src,.hidden}/*.ts", [".hidden/h.ts", "src/a.ts"]],
    ["?.ts", ["a.ts"]],
    ["[ab].ts*", ["a.ts", "b.tsx"]],
    ["[!a].tsx", ["b.tsx"]],
    ["**/[[]x].md", ["src/deep/[x].md"]],
    [".hidden/*", [".hidden/h.ts"]],
    ["*hidden/*", []],
    ["nothing", []],
    ["src", []],
  ])("%s", (pattern, expected) =>
    inSandbox(async ({ call, files }) => {
      for (const name of NAMES) files.write(`/workspace/${name}`, bytes(name));
      const found = (await call("glob", { pattern })).split("\n").sort();
      expect(found).toEqual(expected.length > 0 ? expected.map((name) => `/workspace/${name}`) : ["no matches"]);
    }),
  );

  it.each([
    ["/workspace/*", "absolute pattern not permitted"],
    ["../*", '".." is not permitted'],
    ["{a,../b}", '".." is not permitted'],
    ["{a,b}".repeat(12), "more than 200 alternatives"],
    ["a".repeat(1001), "longer than 1000 characters"],
  ])("refuses %s", (pattern, error) =>
    inSandbox(async ({ call }) => expect(await call("glob", { pattern })).toContain(error)),
  );

  it("shows the newest first, and 200 of them", () =>
    inSandbox(async ({ call, files, storage }) => {
      for (let n = 0; n < 250; n += 1) files.write(`/workspace/${n}`, bytes(""));
      storage.sql.exec("UPDATE nodes SET mtime = mtime + 1000 WHERE path = '/workspace/77'");
      const found = (await call("glob", { pattern: "*" })).split("\n");
      expect([found.length, found[0]]).toEqual([200, "/workspace/77"]);
    }));
});

describe("grep", () => {
  it("shows path, line and text, and leaves out binary files, noise and long lines", () =>
    inSandbox(async ({ call, files }) => {
      files.write("/workspace/a.txt", bytes("one\r\ntwo\nthree one"));
      files.write("/workspace/sub/b.txt", bytes("none"));
      files.write("/workspace/binary", bytes("one\n\0one"));
      files.write("/workspace/node_modules/m", bytes("one"));
      files.write("/workspace/long", bytes(`${"x".repeat(2000)}one`));
      expect(await call("grep", { pattern: "\\bone" })).toBe(
        "/workspace/a.txt:1:one\n/workspace/a.txt:3:three one\n/workspace/binary:1:one",
      );
      expect(await call("grep", { pattern: "one", path: "sub" })).toBe("/workspace/sub/b.txt:1:none");
      expect(await call("grep", { pattern: "two", path: "a.txt" })).toBe("/workspace/a.txt:2:two");
      expect(await call("grep", { pattern: "absent" })).toBe("no matches");
    }));

  it("says what is wrong with a pattern", () =>
    inSandbox(async ({ call }) => {
      for (const pattern of ["(", "a(?=b)", "(a)\\1", "x".repeat(1001), "(x{1000}){1000}"]) {
        expect(await call("grep", { pattern })).toContain("Error: grep: invalid regex: ");
      }
    }));

  it(
    "is not made slow by a pattern that backtracks elsewhere",
    () =>
      inSandbox(async ({ call, files }) => {
        files.write("/workspace/a", bytes(`${"a".repeat(1900)}!\n`.repeat(500)));
        for (const pattern of ["(a+)+$", "(a|aa)+$", "(.*a){20}b", "(x+x+)+y"]) {
          expect(await call("grep", { pattern })).toMatch(/^(no matches|\[the search was cut short)/);
        }
      }),
    20_000,
  );

  it(
    "is cut short when there is too much to do or to say",
    () =>
      inSandbox(async ({ call, files }) => {
        for (let n = 0; n < 4; n += 1) files.write(`/workspace/${n}`, bytes(`${"a".repeat(1000)}\n`.repeat(4000)));
        expect(await call("grep", { pattern: "a{400}b" })).toBe(
          "[the search was cut short: narrow the pattern or the path]",
        );
        const output = await call("grep", { pattern: "a" });
        expect(output.length).toBeLessThan(110 * 1024);
        expect(output).toContain("[output truncated at 102400 bytes]");
      }),
    20_000,
  );
});

describe("bash", () => {
  it("says what to use instead", () =>
    inSandbox(async ({ call }) => expect(await call("bash", { command: "ls" })).toBe(`Error: ${NO_SHELL}`)));
});
