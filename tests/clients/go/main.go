// The Go SDK's own poller and worker, as their documentation starts them.
//
//	run   an EnvironmentWorker, until SIGTERM
//	poll  a WorkPoller, until the queue is empty; prints each session's id
//	item  the one item that the environment variables name, as after `poll --on-work`
//
// And what the tests of providers/docker need of `ant`, the command line around the same code, where no `ant` is to be
// had: `--version`, and `beta:worker run` with the flags and variables that the help of ant 1.20.0 lists.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/anthropics/anthropic-sdk-go"
	"github.com/anthropics/anthropic-sdk-go/lib/environments"
)

const (
	maxIdle    = 200 * time.Millisecond
	antVersion = "0.0.0"
)

func main() {
	if os.Args[1] == "--version" {
		fmt.Println("ant version", antVersion)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := serve(ctx, os.Args[1]); err != nil && !errors.Is(err, context.Canceled) {
		log.Fatal(err)
	}
}

func serve(ctx context.Context, mode string) error {
	client := anthropic.NewClient()
	id, key := os.Getenv("ANTHROPIC_ENVIRONMENT_ID"), os.Getenv("ANTHROPIC_ENVIRONMENT_KEY")
	idle := maxIdle
	switch mode {
	case "run":
		options := environments.EnvironmentWorkerOptions{EnvironmentID: id, EnvironmentKey: key, MaxIdle: &idle}
		return environments.NewEnvironmentWorker(client, options).Run(ctx)
	case "poll":
		options := environments.WorkPollerOptions{EnvironmentID: id, EnvironmentKey: key, Drain: true}
		poller := environments.NewWorkPoller(ctx, client, options)
		defer poller.Close()
		for poller.Next() {
			fmt.Println(poller.Current().Data.ID)
		}
		return poller.Err()
	case "item":
		worker := environments.NewEnvironmentWorker(client, environments.EnvironmentWorkerOptions{MaxIdle: &idle})
		return worker.HandleItem(ctx, environments.HandleItemOptions{})
	case "beta:worker":
		return ant(ctx, client, os.Args[2:])
	}
	return errors.New("run, poll, item or beta:worker")
}

func ant(ctx context.Context, client anthropic.Client, arguments []string) error {
	flags := flag.NewFlagSet("ant beta:worker run", flag.ExitOnError)
	handed := map[string]*string{}
	for _, name := range []string{"session-id", "environment-key", "work-id", "environment-id", "base-url"} {
		handed[name] = flags.String(name, os.Getenv("ANTHROPIC_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))), "")
	}
	workdir := flags.String("workdir", ".", "")
	idle := flags.Duration("max-idle", time.Minute, "")
	if len(arguments) == 0 || arguments[0] != "run" {
		return errors.New("only beta:worker run is here")
	}
	if err := flags.Parse(arguments[1:]); err != nil {
		return err
	}
	for name, value := range handed {
		if *value == "" && name != "base-url" {
			return fmt.Errorf("Required flag %q not set", name)
		}
	}
	options := environments.EnvironmentWorkerOptions{Workdir: *workdir, MaxIdle: idle}
	return environments.NewEnvironmentWorker(client, options).HandleItem(ctx, environments.HandleItemOptions{
		WorkID:         *handed["work-id"],
		EnvironmentID:  *handed["environment-id"],
		SessionID:      *handed["session-id"],
		EnvironmentKey: *handed["environment-key"],
	})
}
