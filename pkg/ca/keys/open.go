package keys

import (
	"crypto"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.step.sm/crypto/kms/uri"

	"github.com/meshid/meshid/internal/durable"
)

// Options are what New needs besides the URI.
type Options struct {
	// Dir is the folder of key files.
	Dir string
	// Secret is the file of the passphrase or PIN, "" for none. It is read when it
	// is needed, so that it may be corrected while the CA runs.
	Secret string
	// Kind of new keys; P-256 for "".
	Kind Kind
	// Timeout bounds one operation of a device or service; zero means 15 s, and a
	// minute for making a key.
	Timeout time.Duration
}

const (
	defaultTimeout = 15 * time.Second
	createTimeout  = time.Minute
	maxSecretBytes = 4096
	minPassphrase  = 16
)

// driver opens one kind of device or service.
type driver struct {
	// build is what `make build-<build>` builds a ca with it; "" for each.
	build string
	// needed and known are the parameters of its URI.
	needed, known []string
	// open is nil where this program was built without it.
	open func(target target) (session, error)
}

// target is what a session is opened to.
type target struct {
	uri *uri.URI
	// secret is the PIN, nil without one.
	secret []byte
	dir    string
}

// session is a connection to a device or service. It is used by one goroutine at a
// time.
type session interface {
	create(name string, kind Kind) (ref string, public crypto.PublicKey, err error)
	// open may be called with the references that create has returned.
	open(ref string) (crypto.Signer, error)
	close() error
}

// drivers is the table of devices and services, by the scheme of their URI.
var drivers = map[string]driver{
	"pkcs11":   {build: "pkcs11", needed: []string{"module-path"}, known: []string{"token", "serial", "slot-id"}, open: openPKCS11},
	"tpmkms":   {known: []string{"device"}, open: openTPM},
	"awskms":   {build: "cloudkms", needed: []string{"region"}, known: []string{"profile", "credentials-file"}, open: openAWS},
	"cloudkms": {build: "cloudkms", needed: []string{"key-ring"}, known: []string{"credentials-file"}, open: openGCP},
	"yubikey":  {build: "yubikey", known: []string{"serial", "management-key-file"}, open: openYubiKey},
	"azurekms": {build: "cloudkms", needed: []string{"vault"}, known: []string{"hsm", "tenant-id", "client-id"}, open: openAzure},
}

// New returns the store that location names, a URI such as "file:" or
// "pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=ca"; "" means "file:".
// New keys are made there. Keys that were made in files before can still be
// opened, so that a root may move to another place by its rotation.
//
// New checks what can be checked without the device; its errors say what to write.
func New(location string, o Options) (Store, error) {
	if o.Kind == "" {
		o.Kind = P256
	}
	scheme, rest, _ := strings.Cut(location, ":")
	if location == "" || scheme == fileScheme {
		if rest != "" {
			return nil, fmt.Errorf("file:%s: write file: alone; key files are in the folder keys of data_dir", rest)
		}
		return newFile(o.Dir, o.Kind, o.Secret), nil
	}
	d, ok := drivers[scheme]
	if !ok {
		names := append(slices.Sorted(maps.Keys(drivers)), fileScheme)
		return nil, fmt.Errorf("%.40q is not a place for keys; write a URI whose scheme is one of %s", scheme, strings.Join(names, ", "))
	}
	u, err := uri.ParseWithScheme(scheme, location)
	if err != nil {
		// The library's text quotes the URI, in which somebody may have put a PIN.
		return nil, fmt.Errorf("the URI of scheme %s cannot be read; write %s:name=value;name=value", scheme, scheme)
	}
	if err := d.check(u); err != nil {
		return nil, fmt.Errorf("%s: %w", scheme, err)
	}
	if d.open == nil {
		return nil, fmt.Errorf("this ca was built without %s: build one with: make build-%s", scheme, d.build)
	}
	files := newFile(o.Dir, o.Kind, "")
	return &remote{scheme: scheme, driver: d, uri: u, options: o, files: files, busy: make(chan struct{}, 1)}, nil
}

// check is strict: a parameter that nobody reads is a mistake.
func (d driver) check(u *uri.URI) error {
	for name := range uri.Values(u) {
		switch {
		case slices.Contains(d.known, name), slices.Contains(d.needed, name):
		case strings.Contains(name, "pin"), strings.Contains(name, "secret"), strings.Contains(name, "password"):
			return fmt.Errorf("%.40s: secrets do not belong into the URI; write the file that holds it into authority.key_secret_file", name)
		default:
			return fmt.Errorf("the URI has no parameter %.40q; write some of %s", name, strings.Join(slices.Concat(d.needed, d.known), ", "))
		}
	}
	for _, name := range d.needed {
		if u.Get(name) == "" {
			return fmt.Errorf("the URI lacks %s=…", name)
		}
	}
	return nil
}

// readSecret reads a passphrase or PIN, without the line's end. The caller clears it.
func readSecret(path string) ([]byte, error) {
	text, err := durable.ReadSecret(path, maxSecretBytes)
	if err != nil {
		return nil, fmt.Errorf("read authority.key_secret_file: %w: %w", err, ErrUnavailable)
	}
	n := len(text)
	for n > 0 && (text[n-1] == '\n' || text[n-1] == '\r') {
		n--
	}
	if n == 0 {
		return nil, fmt.Errorf("authority.key_secret_file: %s is empty: %w", path, ErrUnavailable)
	}
	return text[:n], nil
}
