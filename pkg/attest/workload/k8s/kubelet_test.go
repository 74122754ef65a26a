package k8s

import (
	"context"
	"encoding/pem"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/pkg/config"
	"github.com/meshid/meshid/test/identitytest"
)

// F49: a kubelet or runtime that is gone, hangs or talks nonsense: what is known goes
// on, the rest is told to try again, nothing is withdrawn.
func TestFault_F49_KubeletAndRuntime(t *testing.T) {
	const nonsense = `{"kind":"PodList","items":[`
	for name, fail := range map[string]struct {
		begin, end func(w *world)
		want       string
	}{
		"kubelet hangs": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.hang = make(chan struct{}) }) },
			func(w *world) { w.kubelet.set(func() { close(w.kubelet.hang); w.kubelet.hang = nil }) }, "try again",
		},
		"kubelet fails": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = http.StatusInternalServerError }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = 0 }) }, "try again",
		},
		"kubelet forbids": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = http.StatusForbidden }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = 0 }) }, "nodes/pods",
		},
		"kubelet redirects": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = http.StatusFound }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.code = 0 }) }, "302",
		},
		"another token": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.token = "other" }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.token = "good" }) }, "does not know the token",
		},
		"half a list": {
			func(w *world) { w.kubelet.set(func() { w.kubelet.raw = nonsense }) },
			func(w *world) { w.kubelet.set(func() { w.kubelet.raw = "" }) }, "try again",
		},
		"runtime hangs": {
			func(w *world) { w.runtime.set(func() { w.runtime.hang = make(chan struct{}) }) },
			func(w *world) { w.runtime.set(func() { close(w.runtime.hang); w.runtime.hang = nil }) }, "try again",
		},
		"runtime fails": {
			func(w *world) { w.runtime.set(func() { w.runtime.err = errors.New("disk full") }) },
			func(w *world) { w.runtime.set(func() { w.runtime.err = nil }) }, "disk full",
		},
		"runtime is gone": {
			func(w *world) { w.runtime.stop() },
			func(w *world) { w.runtime.listen(t) }, "try again",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			known, _ := w.run("known")
			w.pod("listed", nil, "listed") // which has no container yet
			before := w.attested(known)
			events := w.watch()
			next(t, events)
			fail.begin(w)
			fresh, _ := w.run("fresh")
			ctx := t.Context()
			if strings.HasSuffix(name, "hangs") { // the agent's patience, made short
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
				defer cancel()
			}
			f, err := w.attestor.Attest(ctx, fresh)
			if err == nil || errors.Is(err, attest.ErrNotMine) || !strings.Contains(err.Error(), fail.want) {
				t.Errorf("facts %v, error %v", f, err)
			}
			if diff := cmp.Diff(before, w.attested(known), protocmp.Transform()); diff != "" {
				t.Errorf("facts of a known container changed:\n%s", diff)
			}
			none(t, events)
			if !strings.HasPrefix(name, "runtime") { // a list that could not be fetched takes none away that could
				listed, _ := w.container("listed", "listed", id("listed"), cgroupOf("listed"), nil)
				w.attested(listed)
			}
			fail.end(w)
			until(t, "the container is attested", func() bool {
				_, err := w.attestor.Attest(t.Context(), fresh)
				return err == nil
			})
		})
	}
}

// F50: a runtime that still lists a container whose process has ended, or whose pid is
// another's.
func TestFault_F50_StaleContainer(t *testing.T) {
	w := newWorld(t)
	init, end := w.run("A")
	p, _ := w.process(cgroupOf("A"))
	w.attested(p)
	end()
	<-init.Done()
	if f, err := w.attestor.Attest(t.Context(), p); err == nil || errors.Is(err, attest.ErrNotMine) || errors.Is(err, peer.ErrGone) {
		t.Errorf("facts %v, error %v of a container that has ended", f, err)
	}
	other, _ := w.process("0::/user.slice\n")
	w.runtime.set(func() { w.runtime.containers[id("A")].pid = other.PID })
	w.refused(p, "no cgroup of its name")
}

// F65: the kubelet forgets its pods, or the list is empty, for however long: nobody
// loses anything.
func TestFault_F65_MissingPods(t *testing.T) {
	w := newWorld(t)
	w.attestor.config.Reconcile = config.Duration(10 * time.Millisecond)
	init, end := w.run("A")
	events := w.watch()
	if e := next(t, events); e.Instance != "k8s:"+id("A") || e.Ended || e.Workload.GetK8S().GetPodName() != "A" {
		t.Errorf("event %v", e)
	}
	for _, raw := range []string{`{"kind":"PodList","items":null}`, `{"kind":"PodList","items":[]}`} {
		w.kubelet.set(func() { w.kubelet.raw = raw })
		// Until Watch itself has looked at it.
		before := w.kubelet.count()
		until(t, "the kubelet was asked again", func() bool { return w.kubelet.count() > before+1 })
		w.attested(init)
		none(t, events)
	}
	w.runtime.set(func() { clear(w.runtime.containers) })
	w.attested(init)
	none(t, events)
	end() // but its end is known
	if e := next(t, events); !e.Ended || e.Instance != "k8s:"+id("A") {
		t.Errorf("event %v, want the end", e)
	}
}

// The kubelet is believed only if its certificate is the right one.
func TestKubeletCertificate(t *testing.T) {
	w := newWorld(t)
	init, _ := w.run("A")
	w.attestor.kubelet.config.NodeName = "other.example"
	w.refused(init, "kubelet_ca", "other.example")
	if n := w.kubelet.count(); n != 0 {
		t.Error("the token was sent to whoever answered")
	}
	w.attestor.kubelet.config.NodeName = "example.com" // which is in it, and it is its own CA
	w.attestor.kubelet.client = nil
	w.attested(init)
}

// Without kubelet_ca, the cluster's CA is believed and the certificate that the kubelet has
// made itself; nothing else, and there need not be both.
func TestKubeletsOwnCertificate(t *testing.T) {
	w := newWorld(t)
	its := w.attestor.config.KubeletCA
	config := w.attestor.config
	config.KubeletCA = ""
	another := identitytest.NewAuthority(t, "example.org")
	other := filepath.Join(t.TempDir(), "other.crt")
	if err := os.WriteFile(other, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: another.Cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(t.TempDir(), "none.crt")
	for _, c := range []struct {
		cluster, own string
		want         string // in the error
	}{
		{its, none, ""},
		{other, its, ""},
		{none, its, ""},
		{other, none, none},
		{other, other, other},
		{none, none, "no such file"},
	} {
		k := newKubelet(config, w.attestor.metrics)
		k.clusterCA, k.own = c.cluster, c.own
		asked := w.kubelet.count()
		_, err := k.pods(t.Context())
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
		if err != nil && w.kubelet.count() != asked {
			t.Errorf("%+v: the token was sent to whoever answered", c)
		}
	}
}

// CAs and token are read again at each call.
func TestFilesAreReadAgain(t *testing.T) {
	w := newWorld(t)
	k := newKubelet(w.attestor.config, w.attestor.metrics)
	if _, err := k.pods(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.kubelet.set(func() { w.kubelet.token = "newer" })
	if err := os.WriteFile(w.attestor.config.TokenFile, []byte("newer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := k.pods(t.Context()); err != nil {
		t.Error(err)
	}
	for name, text := range map[string]string{"nothing": "", "no certificate": "x"} {
		if err := os.WriteFile(w.attestor.config.KubeletCA, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := k.pods(t.Context()); err == nil {
			t.Errorf("%s in kubelet_ca is accepted", name)
		}
	}
}

func TestDecodePods(t *testing.T) {
	for name, text := range map[string]string{
		"empty":        "",
		"nothing":      "{}",
		"other":        `{"kind":"Pod","items":[]}`,
		"no items":     `{"kind":"PodList"}`,
		"items twice":  `{"kind":"PodList","items":[],"items":[]}`,
		"items a text": `{"kind":"PodList","items":"x"}`,
		"cut off":      `{"kind":"PodList","items":[{"metadata":{}}`,
		"a list":       `[]`,
		"uid a number": `{"kind":"PodList","items":[{"metadata":{"uid":1}}]}`,
		"twice":        `{"kind":"PodList","items":[{"metadata":{"uid":"a","name":"a","namespace":"n"}},{"metadata":{"uid":"a","name":"b","namespace":"n"}}]}`,
	} {
		if list, err := decodePods(strings.NewReader(text)); err == nil {
			t.Errorf("%s: %v", name, list)
		}
	}
	list, err := decodePods(strings.NewReader(`{"kind":"PodList","apiVersion":"v1","metadata":{"x":[1]},"items":[{"metadata":{"name":"nameless"}},{"metadata":{"uid":"a","name":"a","namespace":"n"}}]}`))
	if err != nil || len(list) != 1 || list[0].uid != "a" {
		t.Errorf("%v, %v", list, err)
	}
}

func FuzzPods(f *testing.F) {
	f.Add(`{"kind":"PodList","items":[{"metadata":{"uid":"a","name":"a","namespace":"n","labels":{"a":"b"}},"status":{"containerStatuses":[{"containerID":"x://y"}]}}]}`)
	f.Fuzz(func(t *testing.T, text string) {
		list, err := decodePods(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, p := range list {
			if p.uid == "" || p.name == "" || p.namespace == "" {
				t.Errorf("pod %+v", p)
			}
		}
	})
}
