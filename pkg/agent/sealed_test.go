package agent

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshid/meshid/internal/sealed"
	"github.com/meshid/meshid/pkg/health"
)

// TestFault_F37_RestartFromSealedCache: a restart needs no network, changes no key,
// and gives nothing to whom it does not belong.
func TestFault_F37_RestartFromSealedCache(t *testing.T) {
	data, with := sealing(t)
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, data, with)
		h.workloads.container(7, "c1", "shop")
		h.start()
		settleDown()
		ca.apply(uidEntry("a", "/a", 1000), uidEntry("b", "/b", 1000),
			entry("shop", `/{docker.labels["app"]}`, `docker.container_id == "c1"`))
		w, c := h.subscribe(1, 1000), h.subscribe(7, 0)
		settleDown()
		before := mustHave(t, w, "/a", "/b")
		container := mustHave(t, c, "/shop")
		pass(2 * time.Second)
		h.stop()
		if w.Err() == nil {
			t.Error("the watch of a stopped agent goes on")
		}
		raw, err := os.ReadFile(filepath.Join(data, sealedFile))
		if err != nil {
			t.Fatal(err)
		}
		for _, clear := range []string{"/web", "spiffe", "unix"} {
			if strings.Contains(string(raw), clear) {
				t.Errorf("the sealed cache shows %q", clear)
			}
		}
		if st, err := os.Stat(filepath.Join(data, sealedFile)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode of the sealed cache: %v, %v", st.Mode(), err)
		}

		ca.net.set(true)
		h = newHarness(t, ca, data, with)
		h.workloads.container(7, "c1", "shop")
		h.workloads.container(8, "c1", "relabelled") // the id of an old container, other facts
		h.start()
		settleDown()
		w = h.subscribe(2, 1000)
		stranger := h.subscribe(3, 1001)
		relabelled := h.subscribe(8, 0)
		settleDown()
		after := mustHave(t, w, "/a", "/b")
		for n := range after.SVIDs {
			if !after.SVIDs[n].Chain[0].Equal(before.SVIDs[n].Chain[0]) || after.SVIDs[n].Key == nil {
				t.Errorf("identity %d has another certificate after the restart", n)
			}
		}
		mustHave(t, stranger)
		if !stranger.Snapshot().Denied {
			t.Error("a stranger is not denied")
		}
		mustHave(t, relabelled)
		pass(time.Minute)
		c = h.subscribe(7, 0)
		settleDown()
		if got := mustHave(t, c, "/shop").SVIDs[0]; !got.Chain[0].Equal(container.SVIDs[0].Chain[0]) {
			t.Error("the container has another certificate after the restart")
		}
		if ca.attestations != 1 || ca.issued() != 3 {
			t.Errorf("%d attestations, %d items", ca.attestations, ca.issued())
		}
		ca.net.set(false)
		pass(time.Minute)
		settleDown()
		mustHave(t, relabelled, "/relabelled")
		if ca.attestations != 1 {
			t.Errorf("%d attestations, want 1", ca.attestations)
		}
		mustHave(t, w, "/a", "/b")
		h.stop()

		// Nobody comes back: the keys are dropped and the CA is told.
		h = newHarness(t, ca, data, with)
		h.start()
		pass(3 * time.Minute)
		settleDown()
		if got := endedInstances(ca); !slices.Contains(got, "docker:c1") || !slices.Contains(got, "unix:1000:1000:/bin/app") {
			t.Errorf("ended instances %q", got)
		}
		if st := h.Status(); len(st.Instances) != 0 {
			t.Errorf("instances %+v", st.Instances)
		}
		h.stop()
	})
}

func endedInstances(ca *fakeCA) []string {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	var out []string
	for _, m := range ca.heard {
		for _, i := range m.GetInstancesEnded().GetInstances() {
			if len(i.GetSerials()) > 0 {
				out = append(out, i.GetInstance())
			}
		}
	}
	return out
}

// inAnotherBoot makes a sealed cache one that was written before the machine was
// started anew.
func inAnotherBoot(t *testing.T, h *harness) {
	t.Helper()
	v, err := h.openVault()
	if err != nil {
		t.Fatal(err)
	}
	box, err := os.ReadFile(v.path)
	if err != nil {
		t.Fatal(err)
	}
	h.vault = v
	s, err := h.unseal(box)
	if err != nil {
		t.Fatal(err)
	}
	s.Boot = "another"
	plain, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(v.path, v.sealer.Seal(plain), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestFault_F31_Reboot: with a key that outlives a reboot the node is who it was,
// and its workloads, which are others, have new keys.
func TestFault_F31_Reboot(t *testing.T) {
	data, with := sealing(t)
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, data, with)
		h.start()
		settleDown()
		ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		before := mustHave(t, w, "/web")
		h.stop()
		inAnotherBoot(t, h)

		h = newHarness(t, ca, data, with)
		h.start()
		settleDown()
		w = h.subscribe(1, 1000)
		settleDown()
		after := mustHave(t, w, "/web")
		if ca.attestations != 1 {
			t.Errorf("%d attestations, want that the node is who it was", ca.attestations)
		}
		if after.SVIDs[0].Chain[0].Equal(before.SVIDs[0].Chain[0]) {
			t.Error("the key of a workload has outlived the machine's reboot")
		}
		h.stop()
	})
}

// TestFault_F31_RebootWithoutKey: without such a key the node has to be attested
// anew, and what an operator reads says why and what to do.
func TestFault_F31_RebootWithoutKey(t *testing.T) {
	data := filepath.Join(t.TempDir(), "agent")
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	other, err := sealed.New([]byte(strings.Repeat("x", 32)), "a key that is gone", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(data, sealedFile), other.Seal([]byte("{}")), 0o600); err != nil {
		t.Fatal(err)
	}
	name := "meshid:" + filepath.Join(data, sealedFile)
	if _, err := sealed.KeyringSecret(name); err != nil {
		t.Skipf("the kernel gives no keyring here: %v", err)
	}
	defer func() {
		if err := sealed.RemoveKeyringSecret(name); err != nil {
			t.Error(err)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		ca.refuseAttest = status.Error(codes.PermissionDenied, "attestation refused: the CA's ledger says why")
		h := newHarness(t, ca, data, func(c *Config) { c.SealingKeyFile = "" })
		h.start()
		pass(time.Minute)
		settleDown()
		c := h.condition(condNode)
		for _, want := range []string{"make a new join token", "a reboot empties", "sealing_key_file"} {
			if c.Severity != health.Error || !strings.Contains(c.Message, want) {
				t.Errorf("condition %+v does not say %q", c, want)
			}
		}
		ca.mu.Lock()
		ca.refuseAttest = nil
		ca.mu.Unlock()
		pass(time.Minute)
		settleDown()
		if c := h.condition(condNode); c.Severity != health.OK {
			t.Errorf("condition %+v", c)
		}
		h.stop()
	})
}

// TestFault_F42_CorruptedCache: whatever is in the file, the agent starts, and
// attests itself again.
func TestFault_F42_CorruptedCache(t *testing.T) {
	data, with := sealing(t)
	file, seal := filepath.Join(data, sealedFile), filepath.Join(filepath.Dir(data), "seal")
	for name, spoil := range map[string]func(t *testing.T){
		"flipped byte": func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cut": func(t *testing.T) {
			if err := os.Truncate(file, 20); err != nil {
				t.Fatal(err)
			}
		},
		"other key": func(t *testing.T) {
			if err := os.WriteFile(seal, []byte(strings.Repeat("x", 32)), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"readable by others": func(t *testing.T) {
			if err := os.Chmod(file, 0o644); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := newFakeCA(t)
				defer ca.close()
				h := newHarness(t, ca, data, with)
				h.start()
				settleDown()
				ca.apply(uidEntry("web", "/web", 1000))
				w := h.subscribe(1, 1000)
				settleDown()
				mustHave(t, w, "/web")
				h.stop()
				spoil(t)
				before := ca.attestations
				h = newHarness(t, ca, data, with)
				h.start()
				settleDown()
				w = h.subscribe(1, 1000)
				settleDown()
				mustHave(t, w, "/web")
				if ca.attestations != before+1 {
					t.Errorf("%d attestations, want one more than %d", ca.attestations, before)
				}
				if !strings.Contains(h.log.String(), "sealed cache is dropped") {
					t.Error("nothing was logged")
				}
				h.stop()
			})
		})
	}
}

// TestFault_F42_NoSealingKey: without a key nothing is written, and it is said.
func TestFault_F42_NoSealingKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "agent")
	synctest.Test(t, func(t *testing.T) {
		ca := newFakeCA(t)
		defer ca.close()
		h := newHarness(t, ca, dir)
		h.start()
		settleDown()
		ca.apply(uidEntry("web", "/web", 1000))
		w := h.subscribe(1, 1000)
		settleDown()
		mustHave(t, w, "/web")
		if c := h.condition(condSealed); c.Severity != health.Warning || !strings.Contains(c.Message, "sealing_key_file") {
			t.Errorf("condition %+v", c)
		}
		pass(time.Minute)
		h.stop()
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if f.Name() != "agent.lock" {
				t.Errorf("file %s was written", f.Name())
			}
		}
	})
}
