/** Answers that break off or stall after their headers: the SDK has stopped its clock by then. */

import { APIConnectionError, APIError } from "@anthropic-ai/sdk";
import { afterEach, describe, expect, it, vi } from "vitest";
import { openClient } from "../_shared/api.ts";
import { downloadSkill } from "../_shared/skills.ts";
import { bytes } from "./support.ts";

const TIMEOUT_MS = 50;
const JSON_TYPE = { "content-type": "application/json" };

/** An answer of which only `text` arrives; then the connection is lost, or nothing comes any more. */
function part(text: string, then: "lost" | "silent", status = 200): Response {
  const body = new ReadableStream<Uint8Array>({
    start: (controller) => controller.enqueue(bytes(text)),
    pull: (controller) => (then === "lost" ? controller.error(new TypeError("Network connection lost.")) : undefined),
  });
  return new Response(body, { status, headers: JSON_TYPE });
}

function answers(...given: Response[]) {
  const fetched = vi.spyOn(globalThis, "fetch");
  for (const each of given) fetched.mockResolvedValueOnce(each);
  return fetched;
}

const client = (maxRetries: number) => openClient("key", "https://api.example", { maxRetries, timeout: TIMEOUT_MS });

afterEach(() => {
  vi.restoreAllMocks();
});

describe("an answer", () => {
  it.each([
    ["breaks off", () => part('{"id":', "lost")],
    ["stalls", () => part('{"id":', "silent")],
    ["is half of one", () => new Response('{"id":', { headers: JSON_TYPE })],
  ])("that %s is asked for again", async (_, broken) => {
    const fetched = answers(broken(), Response.json({ id: "sesn_1" }));
    expect((await client(1).beta.sessions.retrieve("sesn_1")).id).toBe("sesn_1");
    expect(fetched).toHaveBeenCalledTimes(2);
    answers(broken());
    await expect(client(0).beta.sessions.retrieve("sesn_1")).rejects.toBeInstanceOf(APIConnectionError);
  });

  it("of no content is one, and so is a file in one piece", async () => {
    answers(new Response(null, { status: 204 }), new Response("{", { headers: { "content-type": "application/zip" } }));
    expect(await client(0).beta.sessions.retrieve("sesn_1")).toBeNull();
    const file = await client(0).beta.skills.versions.download("1", { skill_id: "skill_1" });
    expect(await file.text()).toBe("{");
  });

  it("that refuses does so whether or not it can be read", async () => {
    for (const then of ["lost", "silent"] as const) {
      answers(part('{"error":', then, 403));
      const refused = client(0).beta.sessions.retrieve("sesn_1");
      await expect(refused).rejects.toMatchObject({ status: 403 });
    }
  });

  it("with a skill in it that breaks off is an error of the API and none of ours", async () => {
    answers(part("PK", "lost"));
    const version = { id: "1", skillId: "skill_1", directory: "skills/one" };
    await expect(downloadSkill(version, client(0))).rejects.toBeInstanceOf(APIError);
  });
});
