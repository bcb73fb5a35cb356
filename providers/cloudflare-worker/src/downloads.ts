/** The way to get a session's files out: `GET /sessions/<id>/files` lists, `GET /sessions/<id>/files/<path>` downloads. */

import { refuse } from "../_shared/handler.ts";
import { isId } from "../_shared/jobs.ts";
import { resolvePath } from "./files.ts";
import type { SessionObject } from "./session_object.ts";

const ROUTE = /^\/sessions\/([^/]+)\/files(\/.*)?$/;

/** Answers a request for files; undefined when it is for something else. */
export async function handleDownload(
  request: Request,
  key: string,
  sessions: DurableObjectNamespace<SessionObject>,
): Promise<Response | undefined> {
  const match = ROUTE.exec(new URL(request.url).pathname);
  if (match === null || key === "") return undefined;
  if (request.method !== "GET") return refuse(405, "only GET is answered here", { allow: "GET" });
  if (!(await isBearer(request, key))) {
    return refuse(401, "the key is missing or wrong", { "www-authenticate": "Bearer" });
  }
  const [, sessionId, encoded] = match;
  const path = decoded(encoded ?? "");
  if (!isId(sessionId) || path === undefined) return refuse(404, "there is no such file");
  const session = sessions.getByName(sessionId);
  if (path === "" || path === "/") {
    const files = await session.listFiles();
    if (files === undefined) return refuse(404, "there is no such session here");
    return Response.json({
      files: files.map(({ path, size, mtime }) => ({ path, size, modified: new Date(mtime).toISOString() })),
    });
  }
  const bytes = await session.readFile(resolvePath(path));
  if (bytes === undefined) return refuse(404, "there is no such file");
  return new Response(bytes as Uint8Array<ArrayBuffer>, {
    headers: {
      // An agent chose the content: a browser must not run it on this origin.
      "content-type": "application/octet-stream",
      "content-disposition": "attachment",
      "x-content-type-options": "nosniff",
      "content-security-policy": "sandbox",
    },
  });
}

/** Compares digests, in a time that tells nothing about the key. */
async function isBearer(request: Request, key: string): Promise<boolean> {
  const given = /^Bearer (.+)$/i.exec(request.headers.get("authorization") ?? "")?.[1] ?? "";
  const [one, other] = await Promise.all([digest(given), digest(key)]);
  return crypto.subtle.timingSafeEqual(one, other);
}

function digest(text: string): Promise<ArrayBuffer> {
  return crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
}

function decoded(path: string): string | undefined {
  try {
    return decodeURIComponent(path);
  } catch {
    return undefined;
  }
}
