package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// stopGrace is how long a daemon may take to end before it is killed.
const stopGrace = 20 * time.Second

// daemon is a Docker engine of our own. It is not safe for concurrent use: it
// has one owner, who started it.
type daemon struct {
	dir   string
	cmd   *exec.Cmd
	ended chan struct{}
}

// StartPrivate starts a Docker engine whose data, state, socket and process are
// its own, below dir; the machine's network configuration and firewall are not
// touched, except for the bridges of networks that are created in it. It needs
// root and Debian's docker.io. Close ends it.
//
// The path of dir must be short: a Unix socket's path has at most 107 bytes.
func StartPrivate(ctx context.Context, dir string) (*Engine, error) {
	if _, err := exec.LookPath("dockerd"); err != nil {
		return nil, fmt.Errorf("start a docker engine: %w (install Debian's docker.io)", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	e := Open(filepath.Join(dir, "docker.sock"))
	e.daemon = &daemon{dir: dir}
	if err := e.daemon.start(); err != nil {
		return nil, err
	}
	if err := e.awaitReady(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return e, nil
}

func (d *daemon) start() error {
	log, err := os.OpenFile(filepath.Join(d.dir, "dockerd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// Its life is the engine's, not that of the call that started it.
	cmd := exec.Command("dockerd", //nolint:noctx,gosec // the arguments are ours; stopped by Close, with a signal that lets it end its containers
		"--data-root", filepath.Join(d.dir, "data"), "--exec-root", filepath.Join(d.dir, "exec"),
		"--pidfile", filepath.Join(d.dir, "pid"), "--host", "unix://"+filepath.Join(d.dir, "docker.sock"),
		"--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false", "--ip-forward=false",
		"--userland-proxy=false", "--shutdown-timeout=5")
	cmd.Stdout, cmd.Stderr = log, log
	// A group of its own: Ctrl-C at a terminal is for us, and we end it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start dockerd: %w", err)
	}
	d.cmd, d.ended = cmd, make(chan struct{})
	go func(ended chan struct{}) {
		_ = cmd.Wait()
		close(ended)
	}(d.ended)
	return nil
}

func (e *Engine) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := e.Ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-e.daemon.ended:
			return fmt.Errorf("dockerd ended: see %s", filepath.Join(e.daemon.dir, "dockerd.log"))
		case <-ctx.Done():
			return fmt.Errorf("wait for dockerd: %w", err)
		case <-tick.C:
		}
	}
}

// Close ends an engine that StartPrivate started, with all its containers, and
// removes what it kept. It does nothing to an engine that is not ours.
func (e *Engine) Close() error {
	if e.daemon == nil {
		return nil
	}
	e.client.CloseIdleConnections()
	e.daemon.end()
	unmountBelow(e.daemon.dir)
	return os.RemoveAll(e.daemon.dir)
}

func (d *daemon) end() {
	_ = d.cmd.Process.Signal(syscall.SIGCONT)
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
		return
	case <-time.After(stopGrace):
	}
	_ = d.cmd.Process.Kill()
	<-d.ended
}

// Restart ends the private engine as its owner would, and starts it again; its
// containers are stopped by that.
func (e *Engine) Restart(ctx context.Context) error {
	if e.daemon == nil {
		return errors.New("restart an engine that is not ours")
	}
	e.client.CloseIdleConnections()
	e.daemon.end()
	if err := e.daemon.start(); err != nil {
		return err
	}
	return e.awaitReady(ctx)
}

// Hang stops the private engine's process without ending it: connections are
// accepted by the kernel, and nothing is answered until Resume.
func (e *Engine) Hang() error { return e.signal(syscall.SIGSTOP) }

// Resume ends what Hang began.
func (e *Engine) Resume() error { return e.signal(syscall.SIGCONT) }

func (e *Engine) signal(s os.Signal) error {
	if e.daemon == nil {
		return errors.New("signal an engine that is not ours")
	}
	return e.daemon.cmd.Process.Signal(s)
}

// unmountBelow takes away the mounts that an engine which was killed has left.
func unmountBelow(dir string) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return
	}
	lines := strings.Split(string(mounts), "\n")
	slices.Reverse(lines)
	for _, line := range lines {
		f := strings.Fields(line)
		if len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			_ = syscall.Unmount(f[1], syscall.MNT_DETACH)
		}
	}
}

// StopLeftBehind ends a private engine below dir whose owner died, found by its
// pid file, and removes what it kept.
func StopLeftBehind(dir string) error {
	text, err := os.ReadFile(filepath.Join(dir, "pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return os.RemoveAll(dir)
	}
	if err != nil {
		return err
	}
	var pid int
	if _, err := fmt.Sscan(string(text), &pid); err != nil || pid < 2 {
		return fmt.Errorf("pid file of the engine in %s is damaged", dir)
	}
	// The number may belong to another process by now.
	if line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.Contains(string(line), dir) {
		p, err := os.FindProcess(pid)
		if err != nil {
			return err
		}
		_ = p.Signal(syscall.SIGCONT)
		_ = p.Signal(syscall.SIGTERM)
		if !gone(pid, stopGrace) {
			_ = p.Kill()
			gone(pid, stopGrace)
		}
	}
	unmountBelow(dir)
	return os.RemoveAll(dir)
}

func gone(pid int, within time.Duration) bool {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(within); time.Now().Before(deadline); <-tick.C {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
			return true
		}
	}
	return false
}
