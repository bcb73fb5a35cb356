/**
 * What a container may reach: the API and SANDBOX_ALLOWED_HOSTS, by HTTP and HTTPS, and nothing else, unless `*` is among them.
 *
 * The container is started without internet, and the platform hands each of its requests to `Egress`, those over TLS
 * decrypted, by a certificate authority that it puts into the container. Who is asked is decided for each request anew,
 * by what its URL says, and that is where it goes: a connection that was made for one host is no way to another.
 */

import { WorkerEntrypoint } from "cloudflare:workers";
import { errorName, log } from "../_shared/log.ts";

/** What a session's container is held to. It outlives the object's memory, and travels with each request. */
export interface EgressRules {
  readonly session: string;
  /** Lower case; `*.example.com` is every name below it. The API's is among them. */
  readonly hosts: readonly string[];
  readonly baseUrl: string;
}

/** The platform's requests of one container come here. Not reachable from outside. */
export class Egress extends WorkerEntrypoint<unknown, EgressRules> {
  override async fetch(request: Request): Promise<Response> {
    const { session, hosts } = this.ctx.props;
    const { hostname } = new URL(request.url);
    if (!isAllowed(hostname, hosts)) {
      const reason = `${hostname} is not in SANDBOX_ALLOWED_HOSTS`;
      log.warning("egress_refused", { session, reason });
      return new Response(`${reason}\n`, { status: 403 });
    }
    try {
      return await fetch(request, { redirect: "manual" }); // where to, the container asks anew
    } catch (error) {
      log.warning("egress_failed", { session, error: errorName(error), reason: hostname });
      return new Response(`${hostname} could not be reached\n`, { status: 502 });
    }
  }
}

/** Undefined: everything may be reached, since `*` is allowed. */
export function rulesFor(session: string, allowed: readonly string[], baseUrl: string): EgressRules | undefined {
  if (allowed.includes("*")) return undefined;
  const hosts = [...allowed.map((host) => host.toLowerCase()), new URL(baseUrl).hostname];
  return { session, hosts, baseUrl };
}

/** Holds a container to the rules from now on; the platform keeps to those it was given last. */
export async function hold(container: Container, binding: Fetcher, rules: EgressRules): Promise<void> {
  await container.interceptAllOutboundHttp(binding);
  await container.interceptOutboundHttps("*", binding);
  const api = new URL(rules.baseUrl);
  if (api.port === "") return; // one of the two that "all" means: 80 and 443
  if (api.protocol === "https:") await container.interceptOutboundHttps(api.host, binding);
  else await container.interceptOutboundHttp(api.host, binding);
}

function isAllowed(hostname: string, hosts: readonly string[]): boolean {
  const name = hostname.toLowerCase().replace(/\.$/, "");
  return hosts.some((host) => (host.startsWith("*.") ? name.endsWith(host.slice(1)) : name === host));
}
