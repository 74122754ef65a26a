package docker

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/attesttest"
	"github.com/meshid/meshid/pkg/attest/peer"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	"github.com/meshid/meshid/test/self"
)

func TestConformance(t *testing.T) {
	var w *world
	attesttest.Workload(t, attesttest.WorkloadConfig{
		Attestor: func(t *testing.T) attest.WorkloadAttestor {
			w = newWorld(t)
			w.container("a", v2("/docker/"+id("a")), nil)
			return w.attestor
		},
		Mine: func(t *testing.T) (*peer.Peer, func()) {
			w.t = t
			return w.process(v2("/docker/" + id("a")))
		},
		Foreign: func(t *testing.T) *peer.Peer {
			w.t = t
			p, _ := w.process(v2("/system.slice/ssh.service"))
			return p
		},
	})
}

func TestAttest(t *testing.T) {
	w := newWorld(t)
	const image = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	w.engine.images[image] = map[string]string{"maintainer": "team", "team": "shop", "tier": "gold"}
	init, _ := w.container("orders", v2("/docker/"+id("orders")), func(c *fakeContainer) {
		c.Image = image
		// As the engine reports it: the image's, and those of docker run.
		c.Labels = map[string]string{"maintainer": "team", "team": "shop", "tier": "iron", "app": "orders"}
	})
	want := &attest.Facts{
		Workload: &attributesv1.Workload{Docker: &attributesv1.Docker{
			ContainerId: id("orders"), Name: "orders", Image: "registry.internal/shop/orders:1", ImageDigest: image,
			Labels:      map[string]string{"tier": "iron", "app": "orders"},
			ImageLabels: map[string]string{"maintainer": "team", "team": "shop", "tier": "gold"},
		}},
		Instance: "docker:" + id("orders"),
		Rank:     attest.RankContainer,
	}
	got, err := w.attestor.Attest(t.Context(), init)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("facts (-want +got):\n%s", diff)
	}
	// From now on nobody is asked.
	before := w.engine.count("inspect")
	p, _ := w.process(v2("/docker/" + id("orders") + "/sub"))
	if _, err := w.attestor.Attest(t.Context(), p); err != nil {
		t.Error(err)
	}
	if n := w.engine.count("inspect"); n != before {
		t.Errorf("%d more calls for a known container", n-before)
	}
}

// Each row is a peer's cgroup file, and whose container it is; "" is nobody's,
// and "error" that it gets nothing at all. The victim is B.
func TestV_D4_Cgroups(t *testing.T) {
	a, b, n, unknown := id("A"), id("B"), id("N"), id("unknown")
	const nobody, refusal = "", "error"
	type row struct {
		name, peer, want string
	}
	for layout, tc := range map[string]struct {
		inits map[string]string // of the running containers
		rows  []row
	}{
		"v2, cgroupfs": {
			inits: map[string]string{"A": v2("/docker/" + a), "B": v2("/docker/" + b), "N": v2("/docker/" + a + "/" + n)},
			rows: []row{
				{"in A", v2("/docker/" + a), "A"},
				{"below A", v2("/docker/" + a + "/init.scope"), "A"},
				{"in B", v2("/docker/" + b), "B"},
				{"on the host", v2("/system.slice/x.service"), nobody},
				{"root", v2("/"), nobody},
				{"A names a cgroup after B", v2("/docker/" + a + "/" + b), "A"},
				{"A names a deeper cgroup after B", v2("/docker/" + a + "/x/docker/" + b + "/y"), "A"},
				{"a user names a cgroup after B", v2("/user.slice/user-1000.slice/user@1000.service/app.slice/" + b), refusal},
				{"a user names one after B's path", v2("/user.slice/user-1000.slice/user@1000.service/docker/" + b), refusal},
				{"a longer name than B's", v2("/docker/" + b + "0"), nobody},
				{"B's name with a suffix", v2("/docker/" + b + "-x"), refusal},
				{"B's name with a prefix", v2("/docker/x-" + b), refusal},
				{"B's path as a prefix", v2("/docker/" + b + "x/y"), refusal},
				{"upper case", v2("/docker/" + strings.ToUpper(strings.Replace(b, "0", "a", 1))), nobody},
				{"of another runtime", v2("/kubepods/pod1/" + unknown), nobody},
				{"of another runtime inside A", v2("/docker/" + a + "/docker/" + unknown), "A"},
				{"a container below A", v2("/docker/" + a + "/" + n), "A"},
				{"a relative name", v2("/docker/../docker/" + b), refusal},
			},
		},
		"v2, systemd": {
			inits: map[string]string{"A": v2("/system.slice/docker-" + a + ".scope"), "B": v2("/system.slice/docker-" + b + ".scope/init.scope")},
			rows: []row{
				{"in A", v2("/system.slice/docker-" + a + ".scope"), "A"},
				{"in a service of B's systemd", v2("/system.slice/docker-" + b + ".scope/system.slice/w.service"), "B"},
				{"A names a scope after B", v2("/system.slice/docker-" + a + ".scope/docker-" + b + ".scope"), "A"},
				{"a user's scope", v2("/user.slice/user@1000.service/docker-" + b + ".scope"), refusal},
				{"another scope of B's name", v2("/system.slice/x-" + b + ".scope"), refusal},
			},
		},
		"v1": {
			inits: map[string]string{"A": v1("/docker/" + a), "B": v1("/docker/" + b)},
			rows: []row{
				{"in A", v1("/docker/" + a), "A"},
				{"in B", v1("/docker/" + b), "B"},
				{"in B by one controller, else in A", strings.Replace(v1("/docker/"+a), "memory:/docker/"+a, "memory:/docker/"+b, 1), refusal},
				{"in B by all but one controller", strings.Replace(v1("/docker/"+b), "memory:/docker/"+b, "memory:/", 1), refusal},
				{"in B by a hierarchy of its own", "10:name=x:/docker/" + b + "\n" + v1("/"), refusal},
				{"in B by v2 only", strings.Replace(v1("/user.slice"), "0::/", "0::/docker/"+b, 1), refusal},
				{"A names a cgroup after B", v1("/docker/" + a + "/" + b), "A"},
				{"without B's hierarchies", "0::/docker/" + b + "\n", refusal},
			},
		},
		"hybrid, and the agent in a cgroup namespace": {
			inits: map[string]string{"A": v1("/../" + a), "B": v1("/../" + b)},
			rows: []row{
				{"in A", v1("/../" + a), "A"},
				{"A names a cgroup after B", v1("/../" + a + "/" + b), "A"},
				{"elsewhere", v1("/../../user.slice/" + b), refusal},
			},
		},
		"kubernetes": {
			inits: map[string]string{"A": v2("/kubepods/besteffort/pod1/" + a), "B": v2("/kubepods/besteffort/pod2/" + b)},
			rows: []row{
				{"in A", v2("/kubepods/besteffort/pod1/" + a), "A"},
				{"a pod inside a container", v2("/kubepods/besteffort/pod1/" + a + "/kubepods/besteffort/pod2/" + b), "A"},
				{"B's name in A's pod", v2("/kubepods/besteffort/pod1/" + b), refusal},
			},
		},
	} {
		t.Run(layout, func(t *testing.T) {
			w := newWorld(t)
			for name, text := range tc.inits {
				w.container(name, text, nil)
			}
			for _, r := range tc.rows {
				t.Run(r.name, func(t *testing.T) {
					p, _ := w.process(r.peer)
					f, err := w.attestor.Attest(t.Context(), p)
					switch {
					case r.want == nobody:
						if !errors.Is(err, attest.ErrNotMine) {
							t.Errorf("facts %v, error %v, want ErrNotMine", f, err)
						}
					case r.want == refusal:
						if err == nil || errors.Is(err, attest.ErrNotMine) {
							t.Errorf("facts %v, error %v, want a refusal", f, err)
						}
					case err != nil:
						t.Error(err)
					case f.Workload.GetDocker().GetName() != r.want:
						t.Errorf("container %s, want %s", f.Workload.GetDocker().GetName(), r.want)
					}
				})
			}
		})
	}
}

// A container whose init process is in no cgroup of its name cannot be told from
// others.
func TestV_D4_NoCgroupOfItsOwn(t *testing.T) {
	w := newWorld(t)
	w.container("A", v2("/"), nil)
	p, _ := w.process(v2("/docker/" + id("A")))
	if f, err := w.attestor.Attest(t.Context(), p); err == nil || errors.Is(err, attest.ErrNotMine) {
		t.Errorf("facts %v, error %v", f, err)
	}
}

func TestV_D4_TooManyNames(t *testing.T) {
	w := newWorld(t)
	var path strings.Builder
	for n := range 40 {
		path.WriteString("/" + id(fmt.Sprint("c", n)))
	}
	p, _ := w.process(v2(path.String()))
	if _, err := w.attestor.Attest(t.Context(), p); err == nil || errors.Is(err, attest.ErrNotMine) {
		t.Errorf("error %v", err)
	}
	if n := w.engine.count("inspect"); n > 16 {
		t.Errorf("asked the engine %d times", n)
	}
}

// Names that mean no container cost the engine one call each, for a while.
func TestUnknownIDs(t *testing.T) {
	w := newWorld(t)
	p, _ := w.process(v2("/kubepods/" + id("x")))
	for range 10 {
		if _, err := w.attestor.Attest(t.Context(), p); !errors.Is(err, attest.ErrNotMine) {
			t.Fatal(err)
		}
	}
	if n := w.engine.count("inspect"); n != 1 {
		t.Errorf("asked the engine %d times", n)
	}
}

// D11: labels are bytes. Nothing is split, trimmed or folded.
func TestV_D11_Labels(t *testing.T) {
	labels := map[string]string{
		"app": "web", "APP": "admin", "App ": " web ", "a:b": "c=d", "x=y": "1:2",
		"nl": "web\nadmin=true", "": "empty", "empty": "", "utf8": "ä\u2028\x00", "quote": `"},{"`,
	}
	w := newWorld(t)
	init, _ := w.container("A", v2("/docker/"+id("A")), func(c *fakeContainer) { c.Labels = labels })
	f, err := w.attestor.Attest(t.Context(), init)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(labels, f.Workload.GetDocker().GetLabels()); diff != "" {
		t.Errorf("labels (-given +attested):\n%s", diff)
	}
}

// D11: a container with too much is refused, not attested with less.
func TestV_D11_LabelSizes(t *testing.T) {
	many := map[string]string{}
	for n := range maxLabelCount + 1 {
		many[fmt.Sprint(n)] = ""
	}
	for name, labels := range map[string]map[string]string{
		"1 MB":   {"x": strings.Repeat("x", 1<<20)},
		"key":    {strings.Repeat("x", maxLabels+1): ""},
		"many":   many,
		"answer": {"x": strings.Repeat("x", maxAnswer)},
	} {
		for where, change := range map[string]func(w *world, c *fakeContainer){
			"container": func(_ *world, c *fakeContainer) { c.Labels = labels },
			"image":     func(w *world, c *fakeContainer) { c.Image = "sha256:big"; w.engine.images["sha256:big"] = labels },
		} {
			t.Run(name+" of the "+where, func(t *testing.T) {
				w := newWorld(t)
				init, _ := w.container("A", v2("/docker/"+id("A")), func(c *fakeContainer) { change(w, c) })
				if f, err := w.attestor.Attest(t.Context(), init); err == nil || errors.Is(err, attest.ErrNotMine) {
					t.Errorf("facts %.100v, error %v", f, err)
				}
			})
		}
	}
	w := newWorld(t)
	init, _ := w.container("A", v2("/docker/"+id("A")), func(c *fakeContainer) {
		c.Labels = map[string]string{"x": strings.Repeat("x", maxLabels-1)}
	})
	if _, err := w.attestor.Attest(t.Context(), init); err != nil {
		t.Errorf("just below the limit: %v", err)
	}
}

// D12: who builds an image cannot give a container a label.
func TestV_D12_ImageLabels(t *testing.T) {
	for name, tc := range map[string]struct {
		image, all, labels map[string]string
	}{
		"only the image's": {map[string]string{"team": "shop"}, map[string]string{"team": "shop"}, map[string]string{}},
		"overridden":       {map[string]string{"team": "shop"}, map[string]string{"team": "bank"}, map[string]string{"team": "bank"}},
		"other case":       {map[string]string{"Team": "shop"}, map[string]string{"Team": "shop", "team": "shop"}, map[string]string{"team": "shop"}},
		"none":             {nil, map[string]string{"a": "b"}, map[string]string{"a": "b"}},
		"nothing":          {nil, nil, map[string]string{}},
	} {
		if diff := cmp.Diff(tc.labels, ownLabels(tc.all, tc.image)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	// If the image is gone, they cannot be told apart.
	w := newWorld(t)
	init, _ := w.container("A", v2("/docker/"+id("A")), nil)
	w.engine.set(func() { clear(w.engine.images) })
	if f, err := w.attestor.Attest(t.Context(), init); err == nil || !strings.Contains(err.Error(), "was removed") || errors.Is(err, attest.ErrNotMine) {
		t.Errorf("facts %v, error %v", f, err)
	}
}

// The container's end is seen in its init process, whatever the engine says.
func TestV_D14_ContainerEnds(t *testing.T) {
	w := newWorld(t)
	_, endInit := w.container("A", v2("/docker/"+id("A")), nil)
	p, _ := w.process(v2("/docker/" + id("A"))) // as if it had outlived it
	if _, err := w.attestor.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	endInit()
	// The engine says that it runs: neither its facts, nor "in no container", nor
	// that the process itself has ended.
	if f, err := w.attestor.Attest(t.Context(), p); err == nil || errors.Is(err, attest.ErrNotMine) || errors.Is(err, peer.ErrGone) {
		t.Errorf("facts %v, error %v of a container that has ended", f, err)
	}
	// The engine has heard of it.
	w.engine.die(id("A"))
	if f, err := w.attestor.Attest(t.Context(), p); !errors.Is(err, attest.ErrNotMine) {
		t.Errorf("facts %v, error %v", f, err)
	}
	if n := len(w.attestor.index.All()); n != 0 {
		t.Errorf("%d containers in the index", n)
	}
	// Started again: another run under the same id.
	w.container("A", v2("/docker/"+id("A")), nil)
	w.attestor.index.Forget(id("A")) // the event does it
	if _, err := w.attestor.Attest(t.Context(), p); err != nil {
		t.Error(err)
	}
}

// Environment variables hold secrets: there is nowhere to put them.
func TestEnvironmentIsNotRead(t *testing.T) {
	var walk func(reflect.Type)
	walk = func(ty reflect.Type) {
		switch ty.Kind() {
		case reflect.Struct:
			if ty == reflect.TypeFor[time.Time]() {
				return
			}
			for f := range ty.Fields() {
				if strings.HasPrefix(strings.ToLower(f.Name), "env") {
					t.Errorf("field %s.%s", ty, f.Name)
				}
				walk(f.Type)
			}
		case reflect.Interface:
			t.Errorf("a field of %s can hold anything", ty)
		case reflect.Map, reflect.Slice, reflect.Pointer:
			walk(ty.Elem())
		default:
		}
	}
	walk(reflect.TypeFor[inspected]())
	w := newWorld(t)
	init, _ := w.container("A", v2("/docker/"+id("A")), nil)
	f, err := w.attestor.Attest(t.Context(), init)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(f.Workload.String(), "canary") {
		t.Errorf("facts %v", f)
	}
}

// D17, I6: nothing is left over, wherever it ends.
func TestV_D17_Descriptors(t *testing.T) {
	w := newWorld(t)
	init, _ := w.container("A", v2("/docker/"+id("A")), nil)
	w.container("bad", v2("/"), nil)
	bad, _ := w.process(v2("/docker/" + id("bad")))
	if _, err := w.attestor.Attest(t.Context(), init); err != nil {
		t.Fatal(err)
	}
	if _, err := w.attestor.Attest(t.Context(), bad); err == nil {
		t.Fatal("attested")
	}
	before := self.Descriptors(t)
	for range 200 {
		if _, err := w.attestor.Attest(t.Context(), init); err != nil {
			t.Fatal(err)
		}
		if _, err := w.attestor.Attest(t.Context(), bad); err == nil {
			t.Fatal("attested")
		}
		if _, err := w.attestor.index.Refresh(t.Context(), id("A")); err != nil {
			t.Fatal(err)
		}
	}
	if n := self.Descriptors(t); n > before+2 { // connections to the engine come and go
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

func TestNew(t *testing.T) {
	a, err := New(Config{}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if a.Name() != "docker" {
		t.Error(a.Name())
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if _, err := a.index.Get(t.Context(), id("A")); err == nil {
		t.Error("a closed attestor finds a container")
	}
}

var _ interface {
	Watch(ctx context.Context, event func(attest.InstanceEvent)) error
} = (*Attestor)(nil)
