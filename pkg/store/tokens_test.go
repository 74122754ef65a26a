package store

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshid/meshid/pkg/attest/node/jointoken"
	"github.com/meshid/meshid/pkg/server/registry"
)

func TestTokens(t *testing.T) {
	d := open(t, filepath.Join(t.TempDir(), "ca.db"))
	now := time.Unix(200, 0)
	good := newToken(t, d, "good", time.Unix(300, 0))
	late := newToken(t, d, "late", time.Unix(150, 0))
	withdrawn := newToken(t, d, "withdrawn", time.Unix(400, 0))
	open, err := d.Tokens(t.Context(), now)
	if err != nil || len(open) != 2 || open[0].SHA256 != good || open[0].Labels["a"] != "b" {
		t.Fatalf("Tokens = %v, %v", open, err)
	}
	fault := errors.New("fault")
	if err := d.DeleteToken(t.Context(), withdrawn, func() error { return fault }); !errors.Is(err, fault) {
		t.Errorf("DeleteToken = %v", err)
	}
	if err := d.DeleteToken(t.Context(), withdrawn, func() error { return nil }); err != nil {
		t.Error(err)
	}
	if err := d.DeleteToken(t.Context(), withdrawn, func() error { return nil }); !errors.Is(err, ErrNotFound) {
		t.Errorf("second DeleteToken = %v", err)
	}
	tok, err := d.ConsumeToken(t.Context(), good, now)
	want := &jointoken.Token{NodeName: "n", CreatedBy: "uid:0", Labels: map[string]string{"a": "b"}, ExpiresAt: time.Unix(300, 0)}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, tok); diff != "" {
		t.Error(diff)
	}
	for sum, want := range map[[32]byte]error{good: jointoken.ErrUsed, late: jointoken.ErrExpired, withdrawn: jointoken.ErrUnknown} {
		if _, err := d.ConsumeToken(t.Context(), sum, now); !errors.Is(err, want) {
			t.Errorf("ConsumeToken = %v, want %v", err, want)
		}
	}
	if err := d.CreateToken(t.Context(), &registry.Token{SHA256: sha256.Sum256([]byte("x")), CreatedAt: now, ExpiresAt: now.Add(time.Hour)},
		func() error { return fault }); !errors.Is(err, fault) {
		t.Errorf("CreateToken = %v", err)
	}
	if _, err := d.ConsumeToken(t.Context(), sha256.Sum256([]byte("x")), now); !errors.Is(err, jointoken.ErrUnknown) {
		t.Errorf("a token without a record exists: %v", err)
	}
}

// The secret itself is nowhere in the files.
func TestTokensAreHashedAtRest(t *testing.T) {
	dir := t.TempDir()
	d := open(t, filepath.Join(dir, "ca.db"))
	const secret = "canary-7b1d4c0e-join-token"
	newToken(t, d, secret, time.Unix(300, 0))
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if strings.Contains(string(raw), secret) {
			t.Errorf("%s has the token", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// 200 concurrent uses of one token, over two processes' worth of connections.
func TestV_C1_TokenSingleUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	dbs := []*DB{open(t, path), alongside(t, path)}
	for round := range 3 {
		sum := newToken(t, dbs[0], fmt.Sprint(round), time.Unix(300, 0))
		var won, used atomic.Int32
		var wg sync.WaitGroup
		start := make(chan struct{})
		for i := range 200 {
			wg.Go(func() {
				<-start
				_, err := dbs[i%2].ConsumeToken(t.Context(), sum, time.Unix(200, 0))
				switch {
				case err == nil:
					won.Add(1)
				case errors.Is(err, jointoken.ErrUsed):
					used.Add(1)
				default:
					t.Errorf("ConsumeToken: %v", err)
				}
			})
		}
		close(start)
		wg.Wait()
		if won.Load() != 1 || used.Load() != 199 {
			t.Fatalf("%d succeeded and %d found it used", won.Load(), used.Load())
		}
	}
}

// A token of others is used once, over restarts and by several CAs at once, and is
// forgotten when it can be no good to anybody.
func TestUseToken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.db")
	d := open(t, path)
	name := sha256.Sum256([]byte("a token"))
	use := func(d *DB, at time.Time) bool {
		t.Helper()
		first, err := d.UseToken(t.Context(), name, time.Unix(1000, 0), at)
		if err != nil {
			t.Fatal(err)
		}
		return first
	}
	var firsts atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if use(d, time.Unix(500, 0)) {
				firsts.Add(1)
			}
		})
	}
	wg.Wait()
	if n := firsts.Load(); n != 1 {
		t.Errorf("used %d times", n)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, path)
	for at, want := range map[int64]bool{500: false, 1001: false} {
		if got := use(d, time.Unix(at, 0)); got != want {
			t.Errorf("at %d: %v, want %v", at, got, want)
		}
	}
	if !use(d, time.Unix(1000, 0).Add(usedRetention)) {
		t.Error("remembered after it has expired")
	}
}
