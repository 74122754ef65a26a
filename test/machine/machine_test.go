// Package machine has CA and node agent on a Debian machine of their own, installed as
// docs/machines.md says: a virtual one with a TPM, that is booted, rebooted, cleaned, and
// whose disk is stolen.
package machine

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) { os.Exit(local.Main(m)) } //nolint:forbidigo // as every TestMain

// bootTimeout bounds a boot with all that is done in it. The processor is emulated, and
// shared with other tests.
const bootTimeout = 10 * time.Minute

// Debian 12's kernel is older than 6.5: it does not tell the pidfd of who connects.
func TestUnits(t *testing.T) {
	require.Root(t)
	m := newMachine(t)

	said := m.boot(t, "install.sh", m.newTPM(t, "own"))
	const has = "web has spiffe://example\\.org/app/web\n"
	for _, want := range []string{
		"== the node agent(?s:.*)" + has + "active\nactive\n(?s:.*)== killed\nrestarts 1\n" + has + "== restarted(?s:.*)" + has,
		"root in a container is not root of the CA's machine(?s:.*)ca refuses",
		"root in a container is not root of the machine(?s:.*)agent refuses",
	} {
		match(t, said, want)
	}
	_, warnings, _ := strings.Cut(said, "== warnings\n")
	warnings, _, _ = strings.Cut(warnings, "== killed\n")
	for line := range strings.Lines(warnings) {
		switch {
		case strings.Contains(line, "kernel does not tell the pidfd of a peer"):
		case strings.Contains(line, "read its executable: context deadline exceeded"): // on a busy machine: it is asked again
		case strings.Contains(line, "level="):
			t.Errorf("a program warns: %s", line)
		}
	}

	stolen := m.copyDisk(t)
	said = m.boot(t, "reboot.sh", "own")
	for _, want := range []string{
		has + "active\nactive\n",
		`"id":"spiffe://example\.org/meshid/node/join_token/vm-1"`,
		"(?m)^attestations 1$",
		"== remove\n(Removed .*\n)*== removed\n",
	} {
		match(t, said, want)
	}

	m.disk = stolen
	said = m.boot(t, "stolen.sh", m.newTPM(t, "another"))
	for _, want := range []string{"key is not read", "agent does not run"} {
		match(t, said, want)
	}
}

// match looks for an expression in what was said.
func match(t *testing.T, said, expression string) {
	t.Helper()
	if !regexp.MustCompile(expression).MatchString(said) {
		t.Fatalf("it does not say %s:\n%s", expression, said)
	}
}

// machine is a virtual machine that is off.
type machine struct {
	dir    string // with a folder for each TPM
	disk   string
	kernel string
	initrd string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	base := require.Machine(t)
	m := &machine{dir: t.TempDir(), kernel: filepath.Join(base, "vmlinuz"), initrd: filepath.Join(base, "initrd.img")}
	m.disk = filepath.Join(m.dir, "disk.ext4")
	run(t, "cp", "--sparse=always", filepath.Join(base, "disk.ext4"), m.disk)
	return m
}

// copyDisk copies the disk of a machine that is off.
func (m *machine) copyDisk(t *testing.T) string {
	t.Helper()
	path := m.disk + ".copy"
	run(t, "cp", "--sparse=always", m.disk, path)
	return path
}

// newTPM makes a TPM, and returns its name.
func (m *machine) newTPM(t *testing.T, name string) string {
	t.Helper()
	if err := os.Mkdir(filepath.Join(m.dir, name), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

// boot starts the machine with a TPM, runs a script of testdata on it, switches it off,
// and returns what the script printed. The script must come to its end.
func (m *machine) boot(t *testing.T, script, tpm string) string {
	t.Helper()
	t.Logf("booting for %s", script)
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	payload := m.payload(t)
	socket := m.startTPM(t, ctx, tpm)
	said, console := filepath.Join(m.dir, "said"), filepath.Join(m.dir, "console")
	command := fmt.Sprintf(`systemd.run="/bin/sh -c 'mount -o ro /dev/vdb /mnt && exec sh /mnt/%s >/dev/ttyS1 2>&1'"`, script)
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "768", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", m.kernel, "-initrd", m.initrd, "-append", "root=/dev/vda rw console=ttyS0 quiet "+command+
			" systemd.run_success_action=poweroff systemd.run_failure_action=poweroff",
		"-drive", "if=virtio,format=raw,file="+m.disk, "-drive", "if=virtio,format=raw,readonly=on,file="+payload,
		"-chardev", "socket,id=tpm,path="+socket, "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0",
		"-serial", "file:"+console, "-serial", "file:"+said)
	qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := qemu.CombinedOutput()
	text, readErr := os.ReadFile(said)
	text = bytes.ReplaceAll(text, []byte("\r"), nil)
	if err != nil || readErr != nil || !bytes.HasSuffix(bytes.TrimSpace(text), []byte("\ndone")) {
		boot, _ := os.ReadFile(console) // as much as there is
		t.Fatalf("%s did not come to its end (%v, %v)\n%s\nQEMU says: %s\nthe console says: %s", script, err, readErr, text, out, boot)
	}
	t.Logf("%s took %s", script, time.Since(began).Round(time.Second))
	return string(text)
}

// payload makes the second disk: programs, units and scripts.
func (m *machine) payload(t *testing.T) string {
	t.Helper()
	files, disk := t.TempDir(), filepath.Join(t.TempDir(), "payload.ext4")
	for _, from := range []string{local.Binaries(t), filepath.Join(require.Repository(), "deploy/systemd"), "testdata"} {
		if err := os.CopyFS(files, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
	}
	for _, example := range []string{"ca", "token", "entry", "agent", "remove"} {
		if err := os.WriteFile(filepath.Join(files, "example-"+example), []byte(require.Example(t, "machines.md", "sh "+example)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "mke2fs", "-q", "-t", "ext4", "-d", files, disk, "160M")
	return disk
}

// startTPM starts a software TPM, which ends with the machine that uses it, and returns
// its socket.
func (m *machine) startTPM(t *testing.T, ctx context.Context, name string) string {
	t.Helper()
	dir := filepath.Join(m.dir, name)
	socket := filepath.Join(dir, "socket")
	swtpm := exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--terminate", "--tpmstate", "dir="+dir, "--ctrl", "type=unixio,path="+socket)
	swtpm.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := swtpm.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = swtpm.Process.Kill() // it has usually ended
		_ = swtpm.Wait()
	})
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("the TPM does not start: %v", ctx.Err())
		}
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}
