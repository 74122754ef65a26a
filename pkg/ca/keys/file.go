package keys

import (
	"context"
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.step.sm/crypto/pemutil"
)

const (
	fileScheme = "file"
	fileSuffix = ".key"
	// maxKeyFile is far above any private key in PEM.
	maxKeyFile = 64 << 10
)

// File returns a Store that keeps each key as PKCS#8 PEM in a file of its own
// below dir: <name>.key, mode 0600. The directory is made (0700) when the first
// key is. A reference is "file:<name>.key", so that the directory may be moved.
//
// Keys are refused, with the cause and the fix in the error, when the file or
// the directory could be read or replaced by others: a symbolic link, a foreign
// owner, group or world access.
func File(dir string) Store { return newFile(dir, P256, "") }

// newFile is File, but each new key is of kind, and encrypted with the passphrase that
// the file secret holds, if that is not "", which is read each time: PKCS#8 with PBES2
// (PBKDF2 with HMAC-SHA-256 and 600,000 iterations, AES-256-CBC), which openssl reads
// too. Keys that are not encrypted can still be opened.
func newFile(dir string, kind Kind, secret string) *file {
	return &file{dir: dir, kind: kind, secret: secret, step: func(string) error { return nil }}
}

type file struct {
	dir  string
	kind Kind
	// secret is the file of the passphrase, "" for none.
	secret string
	// step is called before each step of a write, with the step's name. Tests
	// have it fail, which leaves what a kill at that moment leaves.
	step func(name string) error
}

// Create writes in this order: a temporary file (0600 from its first byte),
// fsync, hard link to the final name (which cannot overwrite), unlink of the
// temporary name, fsync of the directory. So the final name is either absent or
// holds the whole key.
func (f *file) Create(ctx context.Context, name string) (crypto.Signer, string, error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	if err := checkName(name); err != nil {
		return nil, "", err
	}
	if err := f.makeDirectory(); err != nil {
		return nil, "", err
	}
	options := []pemutil.Options{pemutil.WithPKCS8(true)}
	if f.secret != "" {
		passphrase, err := readSecret(f.secret)
		if err != nil {
			return nil, "", err
		}
		defer clear(passphrase)
		if len(passphrase) < minPassphrase {
			return nil, "", fmt.Errorf("the passphrase in %s has %d characters: write %d or more, such as openssl rand -base64 24 prints", f.secret, len(passphrase), minPassphrase)
		}
		options = append(options, pemutil.WithPassword(passphrase))
	}
	signer, err := f.kind.Generate()
	if err != nil {
		return nil, "", err
	}
	block, err := pemutil.Serialize(signer, options...)
	if err != nil {
		return nil, "", fmt.Errorf("encode key %q: %w", name, err)
	}
	content := pem.EncodeToMemory(block)
	defer clear(content)
	defer clear(block.Bytes)
	if err := f.write(name+fileSuffix, content); err != nil {
		return nil, "", err
	}
	return signer, fileScheme + ":" + name + fileSuffix, nil
}

// Open reads a key after it has checked who else could have read or written it.
func (f *file) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	base, err := cutReference(fileScheme, ref)
	if err != nil {
		return nil, err
	}
	name, ok := strings.CutSuffix(base, fileSuffix)
	if !ok {
		return nil, fmt.Errorf("key reference %q: the file's name must end in %s", ref, fileSuffix)
	}
	if err := checkName(name); err != nil {
		return nil, err
	}
	if err := f.checkDirectory(); err != nil {
		return nil, err
	}
	content, err := f.read(base)
	if err != nil {
		return nil, err
	}
	defer clear(content)
	return f.parse(filepath.Join(f.dir, base), content)
}

// parse decodes one private key. Its errors never quote the content.
func (f *file) parse(path string, content []byte) (crypto.Signer, error) {
	block, rest := pem.Decode(content)
	if block == nil {
		return nil, fmt.Errorf("key file %s is not PEM: restore it from a backup", path)
	}
	defer clear(block.Bytes)
	if len(strings.TrimSpace(string(rest))) > 0 {
		return nil, fmt.Errorf("key file %s holds more than one PEM block: leave only the private key", path)
	}
	options := []pemutil.Options{pemutil.WithFilename(filepath.Base(path))}
	encrypted := block.Type == "ENCRYPTED PRIVATE KEY"
	switch {
	case block.Headers["DEK-Info"] != "":
		return nil, fmt.Errorf("key file %s is encrypted in a way that is too weak (RFC 1423): encrypt it anew (openssl pkcs8 -topk8)", path)
	case encrypted && f.secret == "":
		return nil, fmt.Errorf("key file %s is encrypted: write the file that holds its passphrase into authority.key_secret_file", path)
	case encrypted:
		passphrase, err := readSecret(f.secret)
		if err != nil {
			return nil, err
		}
		defer clear(passphrase)
		options = append(options, pemutil.WithPassword(passphrase))
	}
	key, err := pemutil.ParseKey(content, options...)
	if err != nil {
		// The library's text may describe the content, so it stays out.
		if encrypted {
			return nil, fmt.Errorf("key file %s cannot be decrypted with the passphrase in %s: %w", path, f.secret, ErrRefused)
		}
		return nil, fmt.Errorf("key file %s holds no private key that can be read: restore it from a backup", path)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("key file %s holds a key that cannot sign: it must be a private key", path)
	}
	return signer, nil
}

func (f *file) makeDirectory() error {
	if err := os.MkdirAll(filepath.Dir(f.dir), 0o700); err != nil {
		return fmt.Errorf("make the parent of key directory %s: %w", f.dir, err)
	}
	err := os.Mkdir(f.dir, 0o700)
	switch {
	case err == nil:
		// The umask may have taken bits away from 0700.
		if err := os.Chmod(f.dir, 0o700); err != nil { //nolint:gosec // 0700 is what a directory of secrets needs
			return fmt.Errorf("make key directory %s: %w", f.dir, err)
		}
		if err := syncDirectory(filepath.Dir(f.dir)); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrExist):
		return fmt.Errorf("make key directory %s: %w", f.dir, err)
	}
	return f.checkDirectory()
}

func (f *file) checkDirectory() error {
	info, err := os.Lstat(f.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("key directory %s: %w", f.dir, ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("key directory %s: %w", f.dir, err)
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("key directory %s is a symbolic link: configure the directory itself", f.dir)
	}
	if !info.IsDir() {
		return fmt.Errorf("key directory %s is not a directory", f.dir)
	}
	if err := checkOwner(info); err != nil {
		return fmt.Errorf("key directory %s %w", f.dir, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("key directory %s has mode %04o: others must not have access, run chmod 0700 on it", f.dir, info.Mode().Perm())
	}
	return nil
}

func checkOwner(info fs.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("has an owner that cannot be told on this system")
	}
	if own := os.Geteuid(); int64(stat.Uid) != int64(own) {
		return fmt.Errorf("belongs to uid %d and this process runs as uid %d: chown it", stat.Uid, own)
	}
	return nil
}

func (f *file) read(base string) ([]byte, error) {
	path := filepath.Join(f.dir, base)
	// O_NONBLOCK: a FIFO in the key's place must not hang the start.
	h, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("key file %s: %w; restore it from a backup", path, ErrNotFound)
	case errors.Is(err, syscall.ELOOP):
		return nil, fmt.Errorf("key file %s is a symbolic link: put the key itself there", path)
	case err != nil:
		return nil, fmt.Errorf("open key file: %w", err)
	}
	defer h.Close() //nolint:errcheck // opened for reading only
	info, err := h.Stat()
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("key file %s is not a regular file", path)
	}
	if err := checkOwner(info); err != nil {
		return nil, fmt.Errorf("key file %s %w", path, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s has mode %04o: others must not have access, run chmod 0600 on it, and think of the key as stolen if others were on this machine", path, info.Mode().Perm())
	}
	if info.Size() > maxKeyFile {
		return nil, fmt.Errorf("key file %s has %d bytes: no private key is that large", path, info.Size())
	}
	content, err := io.ReadAll(io.LimitReader(h, maxKeyFile))
	if err != nil {
		return nil, fmt.Errorf("read key file %s: %w", path, err)
	}
	return content, nil
}

// write is Create's write; its steps are named for step.
func (f *file) write(base string, content []byte) error {
	path := filepath.Join(f.dir, base)
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("create key file %s: %w", path, ErrExists)
	}
	// What a kill during an earlier write of this name has left.
	stale, err := filepath.Glob(filepath.Join(f.dir, "."+base+".*.tmp"))
	if err != nil {
		return fmt.Errorf("create key file %s: %w", path, err)
	}
	for _, s := range stale {
		if err := os.Remove(s); err != nil {
			return fmt.Errorf("remove the rest of an interrupted write: %w", err)
		}
	}

	var random [8]byte
	_, _ = rand.Read(random[:]) // never fails
	temporary := filepath.Join(f.dir, "."+base+"."+hex.EncodeToString(random[:])+".tmp")
	if err := f.step("create"); err != nil {
		return err
	}
	h, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("create key file %s: %w", path, err)
	}
	if err := f.fill(h, content); err != nil {
		_ = h.Close()
		return fmt.Errorf("write key file %s: %w", path, err)
	}
	if err := h.Close(); err != nil {
		return fmt.Errorf("write key file %s: %w", path, err)
	}
	if err := f.step("link"); err != nil {
		return err
	}
	if err := os.Link(temporary, path); err != nil {
		_ = os.Remove(temporary)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("create key file %s: %w", path, ErrExists)
		}
		return fmt.Errorf("create key file %s: %w", path, err)
	}
	if err := f.step("unlink"); err != nil {
		return err
	}
	if err := os.Remove(temporary); err != nil {
		return fmt.Errorf("create key file %s: %w", path, err)
	}
	if err := f.step("sync directory"); err != nil {
		return err
	}
	return syncDirectory(f.dir)
}

func (f *file) fill(h *os.File, content []byte) error {
	// The umask may have taken the owner's bits away.
	if err := h.Chmod(0o600); err != nil {
		return err
	}
	if err := f.step("write"); err != nil {
		return err
	}
	half := len(content) / 2
	if _, err := h.Write(content[:half]); err != nil {
		return err
	}
	if err := f.step("write on"); err != nil {
		return err
	}
	if _, err := h.Write(content[half:]); err != nil {
		return err
	}
	if err := f.step("sync"); err != nil {
		return err
	}
	return h.Sync()
}

func syncDirectory(dir string) error {
	h, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := h.Sync(); err != nil {
		_ = h.Close()
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return h.Close()
}
