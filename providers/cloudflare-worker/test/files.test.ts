import { describe, expect, it } from "vitest";
import { MAX_FILE_BYTES, resolvePath } from "../src/files.ts";
import { bytes, inSandbox, MIB } from "./support.ts";

/** A matcher would look at each byte for its report. */
function isEqual(one: Uint8Array, other: Uint8Array): boolean {
  return crypto.subtle.timingSafeEqual(one as Uint8Array<ArrayBuffer>, other as Uint8Array<ArrayBuffer>);
}

describe("the file system", () => {
  it("keeps bytes as they are, below, at and above the size of a chunk", () =>
    inSandbox(({ files }) => {
      for (const size of [0, 1, MIB - 1, MIB, MIB + 1]) {
        const content = Uint8Array.from({ length: size }, (_, at) => (at * 31) % 256);
        files.write("/workspace/file", content);
        expect(files.stat("/workspace/file")).toMatchObject({ isFile: true, size });
        expect(isEqual(files.read("/workspace/file"), content)).toBe(true);
      }
    }));

  it("leaves nothing of a longer file that was there before", () =>
    inSandbox(({ files, storage }) => {
      files.write("/workspace/file", new Uint8Array(3 * MIB));
      files.write("/workspace/file", bytes("short"));
      expect(storage.sql.exec("SELECT count(*) AS n FROM chunks").one()).toEqual({ n: 1 });
    }));

  it("makes the directories above a file, and refuses a file among them", () =>
    inSandbox(({ files }) => {
      files.write("/workspace/a/b/c", bytes("1"));
      expect(files.stat("/workspace/a/b")?.isFile).toBe(false);
      expect(() => files.write("/workspace/a/b/c/d", bytes("1"))).toThrow("not a directory");
      expect(() => files.write("/workspace/a/b", bytes("1"))).toThrow("is a directory");
      expect(() => files.read("/workspace/a/b/c/d")).toThrow("not a directory");
      expect(() => files.read("/workspace/a/x")).toThrow("no such file or directory");
    }));

  it("removes a directory with all that is in it and nothing else", () =>
    inSandbox(({ files }) => {
      for (const path of ["/workspace/a/x", "/workspace/a/y/z", "/workspace/ab", "/workspace/a0"])
        files.write(path, bytes("1"));
      files.remove("/workspace/a");
      expect([...files.files("/")].map((file) => file.path)).toEqual(["/workspace/a0", "/workspace/ab"]);
    }));

  it("is full when it is full, and has room again for less", () =>
    inSandbox(
      ({ files }) => {
        files.write("/workspace/large", new Uint8Array(2 * MIB));
        expect(() => files.write("/workspace/more", new Uint8Array(3 * MIB))).toThrow("no space left");
        files.write("/workspace/large", bytes("small"));
        files.write("/workspace/more", new Uint8Array(3 * MIB));
      },
      { maxBytes: 4 * MIB },
    ));

  it("holds 50,000 files and directories", () =>
    inSandbox(({ files, storage }) => {
      storage.sql.exec(
        "WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < 50000) INSERT INTO nodes SELECT '/workspace/' || i, 1, 0, 0 FROM n",
      );
      expect(() => files.write("/workspace/more", bytes(""))).toThrow("no space left");
      files.write("/workspace/7", bytes("there is room in what is there"));
    }));

  it("refuses what is too large or too long", () =>
    inSandbox(({ files }) => {
      expect(() => files.write("/workspace/a", new Uint8Array(MAX_FILE_BYTES + 1))).toThrow("larger than");
      expect(() => files.write(`/workspace/${"n".repeat(256)}`, bytes(""))).toThrow("file name too long");
      expect(() => files.write(`/workspace/${"é".repeat(128)}`, bytes(""))).toThrow("file name too long");
      expect(() => files.write(`/workspace/${"d/".repeat(2100)}f`, bytes(""))).toThrow("file name too long");
    }));

  it.each([
    ["a", "/workspace/a"],
    ["./a//b/", "/workspace/a/b"],
    ["../etc/passwd", "/etc/passwd"],
    ["/workspace/../../x", "/x"],
    ["/", "/"],
  ])("resolves %s", (path, resolved) => expect(resolvePath(path)).toBe(resolved));
});
