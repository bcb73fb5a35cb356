/** The Worker: webhooks, and the sweep each minute. Settings: see README.md. */

import { SettingsError } from "../_shared/errors.ts";
import { handle } from "../_shared/handler.ts";
import { log } from "../_shared/log.ts";
import { Verifier } from "../_shared/webhook.ts";
import { DISPATCHER_NAME } from "./session_object.ts";
import { readAll } from "./settings.ts";

export { DispatcherObject } from "./dispatcher_object.ts";
export { Egress } from "./egress.ts";
export { SessionObject } from "./session_object.ts";

export default {
  async fetch(request, env, ctx): Promise<Response> {
    const { pathname } = new URL(request.url);
    try {
      const settings = readAll(env);
      if (pathname === "/webhook") {
        const dispatcher = env.DISPATCHER.getByName(DISPATCHER_NAME);
        return await handle(
          request,
          new Verifier(settings.webhookKeys),
          () => ctx.waitUntil(dispatcher.wake()),
          (event) => ctx.waitUntil(dispatcher.suspect(event.sessionId)),
        );
      }
      if (pathname === "/healthz") return Response.json({ ok: true });
      return Response.json({ error: "not found" }, { status: 404 });
    } catch (error) {
      if (!(error instanceof SettingsError)) throw error;
      log.error("settings", { reason: error.message });
      return Response.json({ error: "the settings are wrong: see the log" }, { status: 503 });
    }
  },

  async scheduled(_controller, env): Promise<void> {
    try {
      readAll(env);
      await env.DISPATCHER.getByName(DISPATCHER_NAME).sweep();
    } catch (error) {
      if (!(error instanceof SettingsError)) throw error;
      log.error("settings", { reason: error.message });
    }
  },
} satisfies ExportedHandler<Env>;
