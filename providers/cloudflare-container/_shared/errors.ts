/** What the core throws on purpose. A message says what to do next and never quotes a secret. */

/** A setting is missing or unusable. */
export class SettingsError extends Error {
  override name = "SettingsError";
}

/** A request to the webhook URL was not signed by one of our keys less than five minutes ago. */
export class WebhookRejected extends Error {
  override name = "WebhookRejected";
}

/** A work item that cannot become a job: not ours, malformed, or without a usable secret. */
export class JobRefused extends Error {
  override name = "JobRefused";
}

/** No runner could be started. A retriable failure is tried again within the launch's budget. */
export class LaunchFailed extends Error {
  override name = "LaunchFailed";
  readonly retriable: boolean;

  constructor(message: string, options: { retriable: boolean; cause?: unknown }) {
    super(message, { cause: options.cause });
    this.retriable = options.retriable;
  }
}

/** The item is another runner's, or not ours to serve. Nothing was run and nothing may be stopped. */
export class NotOurs extends Error {
  override name = "NotOurs";
}

/** The sandbox cannot be set up for this session now. The message tells its agent why. */
export class SetupFailed extends Error {
  override name = "SetupFailed";
}

/** A file could not be had from the internet. The message tells the agent why, and never the address. */
export class FetchRefused extends Error {
  override name = "FetchRefused";
}
