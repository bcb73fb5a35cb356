/** The Worker itself, its settings and its log lines. */

import { createExecutionContext, env } from "cloudflare:test";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { openClient } from "../_shared/api.ts";
import { errorName, line, log } from "../_shared/log.ts";
import { redact } from "../_shared/secrets.ts";
import { readSettings } from "../_shared/settings.ts";
import { normaliseKey } from "../_shared/webhook.ts";
import worker from "../src/index.ts";

const REQUIRED = { ANTHROPIC_ENVIRONMENT_ID: "env_1", ANTHROPIC_ENVIRONMENT_KEY: "sk-ant-oat01-x" };
let lines: string[] = [];

beforeEach(() => {
  lines = [];
  for (const level of ["info", "warn", "error"] as const) {
    vi.spyOn(console, level).mockImplementation((text: string) => void lines.push(text));
  }
});
afterEach(() => vi.restoreAllMocks());

function get(path: string, settings: Record<string, string>): Promise<Response> {
  const request = new Request(`https://worker.example${path}`) as Request<unknown, IncomingRequestCfProperties>;
  const { DISPATCHER, SESSIONS } = env; // without the settings of a `.env` that lies here
  return worker.fetch(request, { DISPATCHER, SESSIONS, ...settings } as Env, createExecutionContext());
}

describe("the Worker", () => {
  it("says in its log which settings are wrong, and to the stranger only that they are", async () => {
    const response = await get("/webhook", { ANTHROPIC_ENVIRONMENT_KEY: "two words" });
    expect([response.status, await response.text()]).toEqual([503, '{"error":"the settings are wrong: see the log"}']);
    expect(lines).toHaveLength(1);
    expect(lines[0]).toContain("action=settings reason=");
    expect(lines[0]).toContain("ANTHROPIC_ENVIRONMENT_ID is not set");
    expect(lines[0]).toContain("ANTHROPIC_ENVIRONMENT_KEY is unusable: expected one word of ASCII");
    expect(lines[0]).not.toContain("two words");
  });

  it("takes no webhook without a signing key", async () => {
    expect((await get("/webhook", REQUIRED)).status).toBe(503);
    expect(lines[0]).toContain("ANTHROPIC_WEBHOOK_SIGNING_KEY is not set");
  });

  it("has no way to the files without a password", async () => {
    expect((await get("/sessions/sesn_1/files", REQUIRED)).status).toBe(404);
    expect((await get("/sessions/sesn_1/files", { ...REQUIRED, FILES_KEY: "x" })).status).toBe(401);
    expect((await get("/", REQUIRED)).status).toBe(404);
    expect((await get("/healthz", REQUIRED)).status).toBe(200);
  });
});

describe("the client", () => {
  it("takes a proxy's page for no answer", async () => {
    const page = (): Promise<Response> =>
      Promise.resolve(new Response("<html>Login</html>", { headers: { "content-type": "text/html; charset=utf-8" } }));
    vi.spyOn(globalThis, "fetch").mockImplementation(page);
    const client = openClient("token", "http://unused.invalid", { maxRetries: 0, timeout: 1000 });
    await expect(client.beta.sessions.retrieve("sesn_1")).rejects.toThrow("a page in the place of an answer");
  });
});

describe("settings", () => {
  it("have defaults, and an empty value is none", () => {
    const settings = readSettings({ ...REQUIRED, SANDBOX_MAX_LIVE: " ", ANTHROPIC_BASE_URL: "http://127.0.0.1:1/" });
    expect(settings).toMatchObject({
      maxLive: 100,
      baseUrl: "http://127.0.0.1:1",
      webhookKeys: [],
      maxIdleSeconds: 60,
    });
    expect(readSettings({ ...REQUIRED, ALLOW_ENVIRONMENT_KEY_IN_SANDBOX: "Yes" }).allowEnvironmentKeyInSandbox).toBe(
      true,
    );
  });

  it.each([
    ["SANDBOX_MAX_LIVE", "0", "expected 1 or more"],
    ["SANDBOX_MAX_LIVE", "1.5", "expected 1 or more"],
    ["SANDBOX_MAX_IDLE_SECONDS", "-1", "expected 0 or more seconds"],
    ["SANDBOX_MAX_IDLE_SECONDS", "soon", "expected 0 or more seconds"],
    ["ANTHROPIC_BASE_URL", "ftp://x", "expected a URL"],
    ["ALLOW_ENVIRONMENT_KEY_IN_SANDBOX", "perhaps", "expected true or false"],
    ["ANTHROPIC_API_KEY", "sk-ant-api03-x", "remove it"],
  ])("refuse %s=%s", (name, value, problem) => {
    expect(() => readSettings({ ...REQUIRED, [name]: value })).toThrow(problem);
  });

  it("take the old name of the webhook's key, with a warning", () => {
    const settings = readSettings({ ...REQUIRED, ANTHROPIC_WEBHOOK_SECRET: "whsec_old" });
    expect(settings.webhookKeys).toEqual(["whsec_old"]);
    expect(lines[0]).toContain("set ANTHROPIC_WEBHOOK_SIGNING_KEY instead");
  });

  it.each(["whsec_%%%", "whsec_AAAA", "whsec_A"])("refuse the signing key %s", (key) => {
    expect(() => normaliseKey(key)).toThrow("copy it again");
  });
});

describe("log lines", () => {
  it("are key=value, quoted where a value is not plain, and one line each", () => {
    const values = { session: "sesn_1", ms: 0, reason: 'a "b"\nc=d', error: new TypeError("secret"), work: undefined };
    expect(line("launched", values)).toBe(
      'action=launched session=sesn_1 ms=0 error=TypeError reason="a \\"b\\"\\nc=d"',
    );
    expect(errorName("text")).toBe("string");
  });

  it("show no credential", () => {
    const secrets = ["sk-ant-oat01-abc_D.e-f", "whsec_AbC+/=", `eyJ${"a".repeat(30)}.b.c`];
    for (const secret of secrets) expect(redact(`x ${secret} y`)).toBe("x [redacted] y");
    expect(redact("Authorization: Bearer abc.def")).toBe("Authorization: Bearer [redacted]");
    log.error("launch_failed", { reason: `boom ${secrets.join(" ")}` });
    for (const secret of secrets) expect(lines[0]).not.toContain(secret);
  });
});
