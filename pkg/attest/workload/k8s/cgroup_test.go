package k8s

import (
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// names in the corpus stand for ids and UIDs.
func expand(text string) string {
	var pairs []string
	for _, name := range []string{"A", "B", "C", "S", "unknown"} {
		u := uid("pod " + name)
		if name == "S" {
			u = strings.ReplaceAll(u, "-", "")
		}
		pairs = append(pairs, "{"+name+"}", id(name), "{pod"+name+"}", u, "{pod"+name+"_}", strings.ReplaceAll(u, "-", "_"))
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

// Each file of the corpus is a node: the cgroup files of the init processes of its
// containers, and those of peers with what they get: the facts of a container, none,
// or a refusal.
func corpus(t *testing.T, check func(t *testing.T, w *world, name, want, cgroup string)) {
	files, err := filepath.Glob("testdata/cgroups/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, error %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			w := newWorld(t)
			for _, f := range a.Files {
				cgroup := expand(string(f.Data))
				if name, ok := strings.CutPrefix(f.Name, "init "); ok {
					pod := "pod " + name
					w.pod(pod, nil, name)
					w.container(pod, name, id(name), cgroup, nil)
					if name == "S" {
						w.static(pod, id(name))
					}
					continue
				}
				name, want, ok := strings.Cut(f.Name, ": ")
				if !ok {
					t.Fatalf("section %q", f.Name)
				}
				t.Run(name, func(t *testing.T) { check(t, w, name, want, cgroup) })
			}
		})
	}
}

// static turns a pod into one from the kubelet's files, as the kubelet lists it.
func (w *world) static(pod, id string) {
	hash := strings.ReplaceAll(uid(pod), "-", "")
	w.kubelet.set(func() {
		p := w.kubelet.pods[uid(pod)]
		m := p["metadata"].(object)
		m["uid"] = hash
		m["annotations"] = object{"kubernetes.io/config.hash": hash, "kubernetes.io/config.source": "file"}
		delete(w.kubelet.pods, uid(pod))
		w.kubelet.pods[hash] = p
	})
	w.runtime.set(func() { w.runtime.containers[id].status.Labels[labelPodUID] = hash })
}

func testCgroups(t *testing.T) {
	corpus(t, func(t *testing.T, w *world, name, want, cgroup string) {
		p, _ := w.process(cgroup)
		f, err := w.attestor.Attest(t.Context(), p)
		switch {
		case want == "nobody":
			if !errors.Is(err, attest.ErrNotMine) {
				t.Errorf("facts %v, error %v, want ErrNotMine", f, err)
			}
		case want == "refused":
			if err == nil || errors.Is(err, attest.ErrNotMine) {
				t.Errorf("facts %v, error %v, want a refusal", f, err)
			}
		case err != nil:
			t.Error(err)
		case f.Workload.GetK8S().GetContainerId() != id(want) || f.Instance != "k8s:"+id(want):
			t.Errorf("facts %v of %s, want those of container %s", f.Workload, f.Instance, want)
		}
	})
}

// D4: names of containers and pods in foreign places give nobody's identity.
func TestV_D4_KubernetesCgroups(t *testing.T) { testCgroups(t) }

// F51: the same pods have the same identity by each driver, version and namespace of
// cgroups.
func TestFault_F51_KubernetesCgroups(t *testing.T) {
	seen := map[string]int{}
	corpus(t, func(t *testing.T, w *world, _, want, cgroup string) {
		if want != "A" && want != "B" {
			t.Skip("not of a container of all layouts")
		}
		p, _ := w.process(cgroup)
		k := w.attested(p).Workload.GetK8S()
		seen[k.GetPodUid()+"/"+k.GetContainerId()+"/"+k.GetServiceAccount()]++
	})
	if len(seen) != 2 {
		t.Errorf("identities %v, want one for A and one for B", slices.Sorted(maps.Keys(seen)))
	}
}

// D6: a container that can write its cgroups moves and renames itself below its own,
// whatever names it takes: its identity stays.
func TestV_D6_KubernetesContainerMovesItself(t *testing.T) {
	w := newWorld(t)
	w.run("A")
	w.run("B")
	p, _ := w.process(cgroupOf("A"))
	for _, below := range []string{"", "/x", "/" + id("B"), "/pod" + uid("B") + "/" + id("B"), "/cri-containerd-" + id("B") + ".scope/x"} {
		w.processes.Set(p.PID, strings.TrimSpace(cgroupOf("A"))+below+"\n")
		if got := w.attested(p).Workload.GetK8S().GetPodName(); got != "A" {
			t.Errorf("%q: pod %s", below, got)
		}
	}
	// It cannot name a cgroup outside of its own without the rights of the host's root;
	// if a runtime lets it, it is nobody.
	for _, elsewhere := range []string{"0::/" + id("B") + "\n", "0::/../" + id("A") + "\n", "0::/kubepods/besteffort/pod" + uid("A") + "/x-" + id("A") + "\n"} {
		w.processes.Set(p.PID, elsewhere)
		w.refused(p)
	}
}

// D5: what a process mounts is never looked at: the answer comes from the kernel's
// /proc/<pid>/cgroup alone, through a descriptor that is checked to be procfs.
func TestV_D5_KubernetesMountsAreIgnored(t *testing.T) {
	w := newWorld(t)
	_, _ = w.run("A")
	p, _ := w.process(cgroupOf("A"))
	w.attestor.processes = container.Kernel{} // the real file, in which no pod is
	if f, err := w.attestor.Attest(t.Context(), p); !errors.Is(err, attest.ErrNotMine) {
		t.Errorf("facts %v, error %v of a process that the kernel has in no pod", f, err)
	}
}

func TestPodIn(t *testing.T) {
	const u = "01234567-89ab-cdef-0123-456789abcdef"
	hash := strings.ReplaceAll(u, "-", "")
	under := strings.ReplaceAll(u, "-", "_")
	for segment, want := range map[string]string{
		"pod" + u:    u,
		"pod" + hash: hash,
		"kubepods-burstable-pod" + under + ".slice":         u,
		"kubepods-pod" + under + ".slice":                   u,
		"kubelet-kubepods-besteffort-pod" + hash + ".slice": hash,
		"pod" + under:              "",
		"pod" + u + ".slice":       "", // "-" parts slices
		"pod" + u + "0":            "",
		"pod" + u[:35]:             "",
		"pod" + strings.ToUpper(u): "",
		"Pod" + u:                  "",
		"pod":                      "",
		"podman-" + u + ".scope":   "",
		"xpod" + u:                 "",
		"kubepods-burstable-pod" + under + ".scope": "",
		"": "",
	} {
		got, ok := podIn(segment)
		if ok != (want != "") || ok && got != want {
			t.Errorf("%q: %q, %v, want %q", segment, got, ok, want)
		}
	}
}

func FuzzCgroup(f *testing.F) {
	files, err := filepath.Glob("testdata/cgroups/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for _, section := range a.Files {
			f.Add(expand(string(section.Data)))
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		m, err := container.ParseMemberships([]byte(text))
		if err != nil {
			return
		}
		for _, uid := range []func(container.Memberships) (string, bool){podOf, podAround} {
			found, ok := uid(m)
			if !ok {
				continue
			}
			if !isUID(found) || !strings.Contains(text, found) && !strings.Contains(text, strings.ReplaceAll(found, "-", "_")) {
				t.Errorf("pod %q in %q", found, text)
			}
		}
	})
}
