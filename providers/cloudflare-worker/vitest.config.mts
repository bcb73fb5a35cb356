import { cloudflareTest } from "@cloudflare/vitest-plugin";
import { defineConfig } from "vitest/config";

// Unit tests run in workerd. Those that need a control plane have one when EMULATOR_URL names it, and skip without.
export default defineConfig({
  plugins: [
    cloudflareTest({
      wrangler: { configPath: "./wrangler.jsonc" },
      miniflare: { bindings: { EMULATOR_URL: process.env["EMULATOR_URL"] ?? "" } },
    }),
  ],
  test: { include: ["test/**/*.test.ts"], isolate: false, testTimeout: 30_000 },
});
