package main

import (
	"os"
	"path/filepath"
	"time"

	"github.com/meshid/meshid/pkg/ca"
	"github.com/meshid/meshid/pkg/ca/keys"
)

// keySecretCredential is the credential of systemd that stands in for
// authority.key_secret_file.
const keySecretCredential = "root_key_secret"

// openKeys finds where the root's key lives; no device is asked. bad says what is wrong
// with a field.
func (v *validated) openKeys(bad func(path, format string, args ...any)) {
	a := &v.Authority
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); a.KeySecretFile == "" && dir != "" {
		path := filepath.Join(dir, keySecretCredential)
		if _, err := os.Lstat(path); err == nil { //nolint:gosec // systemd names the folder
			a.KeySecretFile = path
		}
	}
	if a.KeySecretFile != "" && !filepath.IsAbs(a.KeySecretFile) {
		// What is there may be the secret itself: it is not repeated.
		bad("authority.key_secret_file", "not an absolute path; write the path of a file that holds the secret, mode 0600")
	}
	kind, err := keys.ParseKind(a.RootKeyType)
	if err != nil {
		bad("authority.root_key_type", "%v", err)
		return
	}
	if a.Key == "" {
		a.Key = "file:"
	}
	store, err := keys.New(a.Key, keys.Options{Dir: filepath.Join(v.DataDir, "keys"), Secret: a.KeySecretFile, Kind: kind})
	if err != nil {
		bad("authority.key", "%v", err)
		return
	}
	a.RootKeyType, v.keys = string(kind), store
}

// checkProfile reads what is configured of the certificates that sign.
func (v *validated) checkProfile(bad func(path, format string, args ...any)) {
	a := &v.Authority
	kind, err := keys.ParseKind(a.IntermediateKeyType)
	if err != nil {
		bad("authority.intermediate_key_type", "%v", err)
	}
	v.intermediateKey, v.subject = kind, ca.Subject(a.Subject)
	if field, err := v.subject.Check(); err != nil {
		bad("authority.subject."+field, "%v", err)
	}
}

// rootKeyInterval is how often a root's key has to prove itself where that costs
// something: a device's time, or the work of decryption.
const rootKeyInterval = 5 * time.Minute

func (v *validated) keyInterval() time.Duration {
	if v.Authority.Key == "file:" && v.Authority.KeySecretFile == "" {
		return healthInterval
	}
	return rootKeyInterval
}
