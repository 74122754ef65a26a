// Command demo shows the whole of the project on one machine: a CA, a node
// agent, and a shop of Docker containers with a real Envoy beside each service.
// It answers "what does it look like when it runs"; how it is run is the
// business of test/shop/mesh, which the end-to-end tests share.
//
//	demo up         start the shop, show what goes on until Ctrl-C, clean up
//	demo story      the same with a story: scaling, rotations, a crash; then figures
//	demo bootstrap  print an Envoy bootstrap for people to start from
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/meshid/meshid/test/shop/engine"
	"github.com/meshid/meshid/test/shop/mesh"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		return errors.New("no command: up, story or bootstrap")
	}
	flags := flag.NewFlagSet("demo "+args[0], flag.ContinueOnError)
	bin := flags.String("bin", "bin", "folder of the programs ca, node-agent and shop")
	envoy := flags.String("envoy", ".cache/envoy/envoy", "the Envoy program")
	entries := flags.String("entries", "deploy/demo/entries.yaml", "registration entries to apply")
	sotw := flags.Bool("sotw", false, "have Envoy ask for secrets state-of-the-world, not delta")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	config := mesh.Config{Bin: *bin, Envoy: *envoy, Entries: *entries, SDS: mesh.SDSDelta}
	if *sotw {
		config.SDS = mesh.SDSStateOfTheWorld
	}
	switch args[0] {
	case "up":
		config.ExtraCA = "console: {listen: '127.0.0.1:0', one_time_link: true}\n"
		return withMesh(ctx, config, out, up)
	case "story":
		config.Rate, config.RequestsPerConnection = 100, 10
		return withMesh(ctx, config, out, story)
	case "bootstrap":
		return mesh.ExampleBootstrap(config.SDS).Write(out)
	default:
		return fmt.Errorf("unknown command %q: up, story or bootstrap", args[0])
	}
}

// link points to the files of the run while it lasts.
const link = ".up"

// withMesh starts a mesh in a folder of its own, calls play, and cleans up
// whatever happened.
func withMesh(ctx context.Context, config mesh.Config, out io.Writer, play func(context.Context, *mesh.Mesh, io.Writer) error) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("root is needed to attest the processes of other users (make uses sudo)")
	}
	if err := sweep(ctx); err != nil {
		return fmt.Errorf("clean up what an earlier run has left: %w", err)
	}
	dir, err := os.MkdirTemp("", "meshid-")
	if err != nil {
		return err
	}
	// Sidecars, which run as another user, reach their mounts through it.
	if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // nothing in it can be listed
		return err
	}
	if err := os.Symlink(dir, link); err != nil {
		return err
	}
	fmt.Fprintf(out, "• everything of this run is in %s (linked as %s)\n", dir, link)
	e, err := engine.Find(ctx)
	if err != nil {
		fmt.Fprintln(out, "• no Docker engine answers: starting one for this run")
		if e, err = engine.StartPrivate(ctx, filepath.Join(dir, engineDir)); err != nil {
			return err
		}
	}
	config.Dir, config.Engine = dir, e
	config.Progress = func(format string, args ...any) { fmt.Fprintf(out, "• "+format+"\n", args...) }
	defer func() {
		fmt.Fprintln(out, "• cleaning up")
		err = errors.Join(err, e.Close(), os.RemoveAll(dir), os.Remove(link))
	}()
	m, err := mesh.Start(ctx, config)
	if m != nil {
		defer func() { err = errors.Join(err, m.Close()) }()
	}
	if err != nil {
		return unlessStopped(ctx, err)
	}
	return unlessStopped(ctx, play(ctx, m, out))
}

// unlessStopped takes an error that only says that the user pressed Ctrl-C for
// what it is.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}

const engineDir = "docker"

// sweep removes what a run that was killed has left: its containers, its
// processes and its files.
func sweep(ctx context.Context) error {
	dir, err := os.Readlink(link)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := mesh.KillLeftBehind(dir); err != nil {
		return err
	}
	if err := engine.StopLeftBehind(filepath.Join(dir, engineDir)); err != nil {
		return err
	}
	if e, err := engine.Find(ctx); err == nil {
		if err := e.Sweep(ctx, mesh.Label); err != nil {
			return err
		}
	}
	return errors.Join(os.RemoveAll(dir), os.Remove(link))
}
