// The TypeScript SDK's own poller and worker, as their documentation starts them. `node client.mjs run|poll|item`.
//
// run:  an EnvironmentWorker, until SIGTERM.
// poll: a WorkPoller, until the queue is empty; prints each session's id.
// item: the one item that the environment variables name, as after `poll --on-work`.

import Anthropic from '@anthropic-ai/sdk';

const MAX_IDLE_MS = 200;

const stop = new AbortController();
process.on('SIGTERM', () => stop.abort());

const client = new Anthropic({ apiKey: null, authToken: null });
const environmentId = process.env.ANTHROPIC_ENVIRONMENT_ID;
const environmentKey = process.env.ANTHROPIC_ENVIRONMENT_KEY;
const { work } = client.beta.environments;

switch (process.argv[2]) {
  case 'run':
    await work.worker({ environmentId, environmentKey, maxIdleMs: MAX_IDLE_MS }).run(stop.signal);
    break;
  case 'poll':
    for await (const item of work.poller({ environmentId, environmentKey, drain: true })) {
      console.log(item.data.id);
    }
    break;
  case 'item':
    await work.worker({ maxIdleMs: MAX_IDLE_MS }).handleItem();
    break;
  default:
    throw new Error('run, poll or item');
}
