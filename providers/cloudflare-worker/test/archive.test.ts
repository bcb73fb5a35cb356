/** Skill archives, as somebody else made them. */

import { zipSync } from "fflate";
import { createTarGzip } from "nanotar";
import { describe, expect, it } from "vitest";
import { unpack } from "../_shared/archive.ts";
import { bytes, MIB } from "./support.ts";

const HELLO = bytes("hello");

async function unpacked(archive: Uint8Array): Promise<string[]> {
  return [...(await unpack(archive)).keys()];
}

function targz(...names: string[]): Promise<Uint8Array> {
  return createTarGzip(names.map((name) => ({ name, data: HELLO })));
}

describe("an archive", () => {
  it("is unwrapped when one directory holds it all", async () => {
    expect(await unpacked(zipSync({ skill: { "SKILL.md": HELLO, bin: { run: HELLO } } }))).toEqual([
      "SKILL.md",
      "bin/run",
    ]);
    expect(await unpacked(await targz("skill/SKILL.md", "skill/bin/run"))).toEqual(["SKILL.md", "bin/run"]);
    expect(await unpacked(zipSync({ "SKILL.md": HELLO, bin: { run: HELLO } }))).toEqual(["SKILL.md", "bin/run"]);
  });

  it.each(["../x", "/x", "a/../../x", "a\\..\\x"])("does not lead out of itself: %s", async (name) => {
    await expect(unpacked(zipSync({ [name]: HELLO }))).rejects.toThrow("an entry leads out of it");
    const found = await unpacked(await targz("SKILL.md", name)); // nanotar takes that out of a name
    expect(found.filter((path) => path.startsWith("/") || path.split(/[\\/]/).includes(".."))).toEqual([]);
  });

  it("that unpacks to too much is not unpacked", async () => {
    const half = new Uint8Array(17 * MIB); // packed: a few kilobytes
    const bomb = zipSync({ one: half, two: half });
    expect(bomb.byteLength).toBeLessThan(MIB);
    await expect(unpacked(bomb)).rejects.toThrow("it unpacks to more than 33554432 bytes");
    const entries = [1, 2].map((number) => ({ name: `${number}`, data: half }));
    await expect(unpacked(await createTarGzip(entries))).rejects.toThrow("it unpacks to more than 33554432 bytes");
  });

  it("that has too many files is not unpacked", async () => {
    const many = Object.fromEntries(Array.from({ length: 2001 }, (_, n) => [`${n}`, HELLO]));
    await expect(unpacked(zipSync(many))).rejects.toThrow("it has more than 2000 files");
  });

  it.each(["PK\u0003\u0004", "\u001f\u008b\u0008\u0000"])("that is none is refused: %j", async (text) => {
    const broken = Uint8Array.from(text, (char) => char.charCodeAt(0));
    await expect(unpack(broken)).rejects.toThrow("it is no readable zip, tar or tar.gz");
  });
});
