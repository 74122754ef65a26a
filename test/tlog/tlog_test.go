// Package tlog holds the ledger's tree of a real CA against programs that are not
// ours: one that checks logs in the format of C2SP tlog-tiles, and a witness.
package tlog

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/mod/sumdb/note"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/local"
	"github.com/meshid/meshid/test/require"
)

func TestMain(m *testing.M) {
	os.Exit(local.Main(m)) //nolint:forbidigo // TestMain is this package's main
}

// grow makes n records.
func grow(t *testing.T, ca *local.CA, generation, n int) {
	t.Helper()
	for i := range n {
		if _, err := ca.Admin.CreateToken(t.Context(), &adminv1.CreateTokenRequest{NodeName: fmt.Sprintf("node-%d-%d", generation, i)}); err != nil {
			t.Fatal(err)
		}
	}
}

// fsck has the checker of the Tessera project read a log.
func fsck(t *testing.T, dir, vkey string) error {
	t.Helper()
	key := filepath.Join(t.TempDir(), "vkey")
	if err := os.WriteFile(key, []byte(vkey), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), require.Tool(t, "fsck"), "--storage_url=file://"+dir+"/", "--public_key="+key, "--ui=false", "--N=2")
	out, err := cmd.CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) || bytes.Contains(out, []byte("Invalid")) { // its exit code says nothing
		return fmt.Errorf("fsck: %w: %s", errors.Join(err, errors.New("refused")), out)
	}
	return nil
}

// TestFsck has a checker that is not ours accept the tree of a CA, and refuse it
// when it was changed.
func TestFsck(t *testing.T) {
	require.Tool(t, "fsck")
	ca := local.StartCA(t, local.CAOptions{})
	grow(t, ca, 1, 300)
	grow(t, ca, 2, 300)
	journal, tree := filepath.Join(ca.DataDir, "ledger"), filepath.Join(ca.DataDir, "tree")
	if err := ca.Stop(t); err != nil {
		t.Fatal(err)
	}
	vkey := strings.TrimSpace(ca.MustCommand(t, "ledger", "key", "--dir", journal))
	if err := fsck(t, tree, vkey); err != nil {
		t.Fatal(err)
	}
	ca.MustCommand(t, "ledger", "verify", "--dir", journal, "--key", vkey)
	// Restarted, it is one log still.
	ca.Start(t)
	ca.AwaitReady(t)
	grow(t, ca, 3, 100)
	if err := ca.Stop(t); err != nil {
		t.Fatal(err)
	}
	if err := fsck(t, tree, vkey); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tile/0/000", "tile/entries/001"} {
		path := filepath.Join(tree, name)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)-1] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := fsck(t, tree, vkey); err == nil {
			t.Errorf("fsck accepts another %s", name)
		}
		if _, err := ca.Command(t, "ledger", "verify", "--dir", journal, "--key", vkey); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("verify: %v", err)
		}
		b[len(b)-1] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// witness is a real one, of the transparency-dev project.
func witness(t *testing.T, ca *local.CA, logKey string) (p *local.Process, url, vkey string) {
	t.Helper()
	dir := t.TempDir()
	skey, vkey, err := note.GenerateKey(rand.Reader, "witness.test")
	if err != nil {
		t.Fatal(err)
	}
	origin, _, _ := strings.Cut(logKey, "+")
	for name, content := range map[string]string{
		"key":  skey,
		"logs": fmt.Sprintf("Logs:\n  - Origin: %s\n    URL: http://log.invalid/\n    PublicKey: %s\n    Feeder: none\n", origin, logKey),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	address := local.FreeAddress(t)
	p = local.Run(t, require.Tool(t, "omniwitness"), "--listen", address, "--metrics_listen", "", "--private_key_path", filepath.Join(dir, "key"),
		"--db_file", filepath.Join(dir, "db"), "--additional_logs", filepath.Join(dir, "logs"))
	return p, "http://" + address + "/", vkey
}

// gauge reads one metric of a CA.
func gauge(ctx context.Context, ca *local.CA, name string) (float64, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+ca.Metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(answer.Body)
	if err != nil {
		return 0, err
	}
	for _, m := range families[name].GetMetric() {
		return m.GetGauge().GetValue(), nil
	}
	return 0, fmt.Errorf("no metric %s", name)
}

// TestFault_F67_RealWitness has a witness that is not ours cosign the ledger of a
// CA, takes it away, and brings it back.
func TestFault_F67_RealWitness(t *testing.T) {
	require.Tool(t, "omniwitness")
	ca := local.StartCA(t, local.CAOptions{})
	journal := filepath.Join(ca.DataDir, "ledger")
	logKey := strings.TrimSpace(ca.MustCommand(t, "ledger", "key", "--dir", journal))
	p, url, vkey := witness(t, ca, logKey)
	if err := ca.Stop(t); err != nil {
		t.Fatal(err)
	}
	config, err := os.OpenFile(filepath.Join(ca.Dir, "ca.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(config, "\nledger:\n  witnesses: [{url: '%s', key: '%s'}]\n", url, vkey)
	if err := errors.Join(err, config.Close()); err != nil {
		t.Fatal(err)
	}
	ca.Start(t)
	ca.AwaitReady(t)
	cosigned := func(context.Context) error {
		_, err := ca.Command(t, "ledger", "verify", "--dir", journal, "--key", logKey, "--witness", vkey)
		return err
	}
	local.Await(t, "a cosignature\n"+p.Log(), cosigned)
	grow(t, ca, 1, 300)
	local.Await(t, "a cosignature on more records", cosigned)

	p.Kill()
	grow(t, ca, 2, 300) // nothing waits for it
	local.Await(t, "an age without cosignatures", func(ctx context.Context) error {
		age, err := gauge(ctx, ca, "meshid_ca_ledger_tree_unwitnessed_seconds")
		if err == nil && age < 1 {
			err = fmt.Errorf("it is %v s", age)
		}
		return err
	})
	ca.MustCommand(t, "ledger", "verify", "--dir", journal, "--key", logKey) // signed, for all that

	p.Start(t)
	local.Await(t, "a cosignature after the witness is back", cosigned)
	if err := fsck(t, filepath.Join(ca.DataDir, "tree"), logKey); err != nil {
		t.Error(err)
	}
	proof := filepath.Join(t.TempDir(), "p.tlog-proof")
	ca.MustCommand(t, "ledger", "prove", "--dir", journal, "--index", "200", "-o", proof)
	ca.MustCommand(t, "ledger", "verify", "--proof", proof, "--key", logKey, "--witness", vkey)
}
