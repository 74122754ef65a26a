package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// stopGrace is how long a process may take to end before it is killed.
const stopGrace = 15 * time.Second

// Process is one of our programs, which can be stopped, killed and started again.
// It has one owner and is not safe for concurrent use.
type Process struct {
	name, log string
	args      []string
	cmd       *exec.Cmd
	ended     chan struct{}
}

func newProcess(name, logDir string, args ...string) *Process {
	return &Process{name: name, log: filepath.Join(logDir, name+".log"), args: args}
}

// Start starts the process; what it prints goes to its log.
func (p *Process) Start() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// Its life does not depend on the call that started it.
	cmd := exec.Command(p.args[0], p.args[1:]...) //nolint:noctx,gosec // the arguments are ours; stopped by Stop or Kill
	cmd.Stdout, cmd.Stderr = log, log
	// A group of its own: Ctrl-C at a terminal is for us, and we end it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	ended := make(chan struct{})
	p.cmd, p.ended = cmd, ended
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	return nil
}

// KillLeftBehind kills the processes of a mesh in dir whose owner died: those
// whose command line names a file in dir.
func KillLeftBehind(dir string) error {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(line, []byte("\x00run\x00--config\x00"+dir+"/")) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(path, "/proc/%d/cmdline", &pid); err != nil {
			return err
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return nil
}

// Ended is closed when the process has ended.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Stop ends the process as its operator would; it is an error if it had to be
// killed, or reported a failure.
func (p *Process) Stop() error {
	if p == nil || p.cmd == nil {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGCONT)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			return fmt.Errorf("%s: %s: %s", p.name, p.cmd.ProcessState, p.Tail())
		}
		return nil
	case <-time.After(stopGrace):
		p.Kill()
		return fmt.Errorf("%s did not stop within %v and was killed: %s", p.name, stopGrace, p.Tail())
	}
}

// Kill kills the process (SIGKILL) and waits until it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// Signal sends a signal to the process.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Tail returns the last lines that the process has printed.
func (p *Process) Tail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-15):], []byte("\n")))
}

// run runs a command to its end and returns what it printed.
func run(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...) //nolint:gosec // the arguments are ours
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(args[0]), args[1], err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.Bytes(), nil
}

// Await asks again and again until done says so; a time-out returns the last
// error that done gave as the reason.
func Await(ctx context.Context, what string, timeout time.Duration, done func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var reason error
	for {
		err := done(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || reason == nil { // else it may only say that the time is over
			reason = err
		}
		if final, ok := errors.AsType[*finalError](err); ok {
			return fmt.Errorf("wait for %s: %w", what, final.err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: not within %v: %w", what, timeout, reason)
		case <-tick.C:
		}
	}
}

// finalError ends Await at once.
type finalError struct{ err error }

func (e *finalError) Error() string { return e.err.Error() }
