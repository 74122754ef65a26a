package sealed

import (
	"crypto/rand"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNoKeyring is wrapped when the kernel has no keyring for this process, as in
// many containers.
var ErrNoKeyring = errors.New("the kernel's keyring cannot be used")

// keyPermissions let processes of the same user find, read and update the key
// without having it in their session, and nobody else: a service is given a new
// session at each start.
const keyPermissions = 0x3f_0f_00_00 // possessor: all; user: view, read, write, search

// KeyringSecret returns the secret with this name from the user's keyring, and
// makes one of 32 random bytes if there is none. It never reaches a disk, stays
// when the process ends, and is gone after a reboot.
func KeyringSecret(name string) ([]byte, error) {
	// The process keyring belongs to a thread's credentials.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	secret, err := findKey(name)
	if err == nil {
		return secret, nil
	}
	if !errors.Is(err, unix.ENOKEY) && !errors.Is(err, unix.EKEYEXPIRED) && !errors.Is(err, unix.EKEYREVOKED) {
		return nil, fmt.Errorf("%w: %w", ErrNoKeyring, err)
	}
	if err := createKey(name); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoKeyring, err)
	}
	// What the keyring has now is what the next start will find, also if another
	// process was faster.
	if secret, err = findKey(name); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoKeyring, err)
	}
	return secret, nil
}

// findKey reads the key from the user's keyring.
func findKey(name string) ([]byte, error) {
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", name, 0)
	if err != nil {
		return nil, fmt.Errorf("search key: %w", err)
	}
	buffer := make([]byte, maxSecret)
	n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, buffer, 0)
	if err != nil {
		return nil, fmt.Errorf("read key: %w", err)
	}
	if n < MinSecret || n > len(buffer) {
		return nil, fmt.Errorf("read key: it has %d bytes, which is not what was put there", n)
	}
	return buffer[:n], nil
}

// createKey makes the key in the thread's keyring, where its permissions may be
// set, and links it to the user's.
func createKey(name string) error {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	id, err := unix.AddKey("user", name, secret, unix.KEY_SPEC_THREAD_KEYRING)
	if err != nil {
		return fmt.Errorf("add key: %w", err)
	}
	if err := unix.KeyctlSetperm(id, keyPermissions); err != nil {
		return fmt.Errorf("set permissions of key: %w", err)
	}
	if _, err := unix.KeyctlInt(unix.KEYCTL_LINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0); err != nil {
		return fmt.Errorf("link key: %w", err)
	}
	if _, err := unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_THREAD_KEYRING, 0, 0); err != nil {
		return fmt.Errorf("unlink key: %w", err)
	}
	return nil
}

// RemoveKeyringSecret deletes the secret, if there is one.
func RemoveKeyringSecret(name string) error {
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", name, 0)
	if errors.Is(err, unix.ENOKEY) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("search key: %w", err)
	}
	if _, err := unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0); err != nil {
		return fmt.Errorf("unlink key: %w", err)
	}
	return nil
}
