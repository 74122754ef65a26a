// Command with-docker runs a command while a Docker engine answers: the
// machine's own if it does, else a private one that is started for the time of
// the command and named by DOCKER_HOST. It answers "where is the engine", and
// knows nothing of the command.
//
//	go run ./scripts/with-docker go test ./...
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/meshid/meshid/test/shop/engine"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode()) //nolint:forbidigo,gocritic // the exit code of the command is ours
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "with-docker:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) == 0 {
		return errors.New("no command (usage: with-docker COMMAND [ARGUMENT])")
	}
	e, err := engine.Find(ctx)
	if err != nil {
		dir, err := os.MkdirTemp("", "meshid-docker-")
		if err != nil {
			return err
		}
		if e, err = engine.StartPrivate(ctx, dir); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...) //nolint:gosec // running a command is what this is for
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+e.Socket)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	return cmd.Run()
}
