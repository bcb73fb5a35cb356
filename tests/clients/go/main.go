// The Go SDK's own poller and worker, as their documentation starts them.
//
//	run   an EnvironmentWorker, until SIGTERM
//	poll  a WorkPoller, until the queue is empty; prints each session's id
//	item  the one item that the environment variables name, as after `poll --on-work`
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/anthropics/anthropic-sdk-go"
	"github.com/anthropics/anthropic-sdk-go/lib/environments"
)

const maxIdle = 200 * time.Millisecond

func main() {
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
	}
	return errors.New("run, poll or item")
}
