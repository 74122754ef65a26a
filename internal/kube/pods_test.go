package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func podOf(t *testing.T, text string) *Pod {
	t.Helper()
	var o podObject
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		t.Fatal(err)
	}
	return newPod(&o)
}

const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestPodFacts(t *testing.T) {
	p := podOf(t, `{"metadata":{"namespace":"shop","name":"web-1","uid":"u1","labels":{"app":"web","team":"shop"},
		"annotations":{"kubernetes.io/config.mirror":"forged"},
		"ownerReferences":[{"kind":"Other","name":"o","uid":"x"},{"kind":"ReplicaSet","name":"web","uid":"rs1","controller":true}]},
		"spec":{"nodeName":"n1","serviceAccountName":"web","initContainers":[{"name":"init","image":"i:1"}],
			"containers":[{"name":"app","image":"r.internal/app:2"},{"name":"later","image":"l:1"}],"ephemeralContainers":[{"name":"debug","image":"d:1"}]},
		"status":{"phase":"Running","initContainerStatuses":[{"name":"init","imageID":"docker-pullable://r/i@`+digest+`","containerID":"docker://c0"}],
			"containerStatuses":[{"name":"app","image":"full/app:2","imageID":"r.internal/app@`+digest+`","containerID":"containerd://c1"}],
			"ephemeralContainerStatuses":[{"name":"debug","imageID":"`+digest+`","containerID":"cri-o://c2"}]}}`)
	type container struct{ id, image, runs, digest string }
	got := map[string]container{}
	for _, name := range []string{"init", "app", "later", "debug"} {
		c, ok := p.Container(name)
		if !ok {
			t.Errorf("no container %s", name)
		}
		got[name] = container{c.ID, c.Image(), c.RunsImage(), c.ImageDigest()}
	}
	if diff := cmp.Diff(map[string]container{
		"init": {"c0", "i:1", "", digest}, "app": {"c1", "r.internal/app:2", "full/app:2", digest}, "later": {"", "l:1", "", ""}, "debug": {"c2", "d:1", "", digest},
	}, got, cmp.AllowUnexported(container{})); diff != "" {
		t.Errorf("containers (-want +got):\n%s", diff)
	}
	kind, name, uid := p.Owner()
	if diff := cmp.Diff([]string{"u1", "", "web-1", "shop", "web", "n1", "ReplicaSet", "web", "rs1"},
		[]string{p.UID, p.StaticUID, p.Name, p.Namespace(), p.ServiceAccount(), p.Node(), kind, name, uid}); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"app": "web", "team": "shop"}, p.Labels()); diff != "" {
		t.Error(diff)
	}
	if _, ok := p.Container("none"); ok {
		t.Error("a container that is not there")
	}
	for id, want := range map[string]string{"": "", "sha256:12": "", "r/x:1": "", digest: digest, "a/b@" + digest: digest, "docker://" + digest: digest} {
		if got := imageDigest(id); got != want {
			t.Errorf("digest of %q: %q", id, got)
		}
	}
}

// A pod is a static one only if its node says so, which it can of pods without service
// account alone.
func TestPodStatic(t *testing.T) {
	for name, test := range map[string]struct{ owner, node, account, want string }{
		"static":           {"Node", "n1", "", "hash"},
		"by a user":        {"ReplicaSet", "n1", "", ""},
		"of another node":  {"Node", "n2", "", ""},
		"with an identity": {"Node", "n1", "web", ""},
	} {
		p := podOf(t, fmt.Sprintf(`{"metadata":{"uid":"u","annotations":{"kubernetes.io/config.mirror":"hash"},
			"ownerReferences":[{"kind":%q,"name":%q,"uid":"x","controller":true}]},"spec":{"nodeName":"n1","serviceAccountName":%q}}`, test.owner, test.node, test.account))
		if p.StaticUID != test.want {
			t.Errorf("%s: %q", name, p.StaticUID)
		}
	}
}

func TestPodOver(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, test := range map[string]struct {
		text string
		over bool
	}{
		"pending":             {`{"status":{"phase":"Pending"}}`, false},
		"running":             {`{"status":{"phase":"Running"}}`, false},
		"unknown":             {`{"status":{"phase":"Unknown"}}`, false},
		"succeeded":           {`{"status":{"phase":"Succeeded"}}`, true},
		"failed":              {`{"status":{"phase":"Failed"}}`, true},
		"in its grace":        {`{"metadata":{"deletionTimestamp":"2026-01-02T03:04:35Z"},"status":{"phase":"Running"}}`, false},
		"clocks are apart":    {`{"metadata":{"deletionTimestamp":"2026-01-02T03:03:40Z"},"status":{"phase":"Running"}}`, false},
		"its node does not":   {`{"metadata":{"deletionTimestamp":"2026-01-02T03:03:30Z"},"status":{"phase":"Running"}}`, true},
		"deleted and succeed": {`{"metadata":{"deletionTimestamp":"2026-01-02T03:04:35Z"},"status":{"phase":"Succeeded"}}`, true},
	} {
		if got := podOf(t, test.text).Over(now); got != test.over {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// newIndex returns the index of a cluster that nothing is heard of.
func newIndex(t *testing.T) (*Pods, podReader, nodeReader) {
	t.Helper()
	p := newPods()
	return p, podReader{p}, nodeReader{p}
}

func simplePod(t *testing.T, uid, namespace, account, node, more string) *Pod {
	t.Helper()
	return podOf(t, fmt.Sprintf(`{"metadata":{"uid":%q,"namespace":%q,"name":%q%s},"spec":{"nodeName":%q,"serviceAccountName":%q}}`, uid, namespace, uid, more, node, account))
}

func TestPodsIndex(t *testing.T) {
	p, pods, nodes := newIndex(t)
	on := func(node string) string {
		var uids []string
		for pod := range p.OnNode(node) {
			uids = append(uids, pod.UID)
		}
		slices.Sort(uids)
		return strings.Join(uids, " ")
	}
	find := func(node, uid, want string, was bool) {
		t.Helper()
		got, deleted := p.Find(node, uid)
		name := ""
		if got != nil {
			name = got.UID
		}
		if name != want || deleted != was {
			t.Errorf("%s on %s: %q, %v; want %q, %v", uid, node, name, deleted, want, was)
		}
	}
	const mirror = `,"annotations":{"kubernetes.io/config.mirror":"hash"},"ownerReferences":[{"kind":"Node","name":"n1","uid":"x","controller":true}]`
	pods.Replace([]*Pod{
		simplePod(t, "a", "shop", "web", "n1", ""), simplePod(t, "b", "shop", "db", "n2", ""), simplePod(t, "c", "shop", "web", "", ""),
		simplePod(t, "m", "kube-system", "", "n1", mirror),
	})
	nodes.Replace([]nodeName{{"n1", "nu1"}, {"n2", "nu2"}})
	if on("n1") != "a m" || on("n2") != "b" || on("n3") != "" {
		t.Errorf("on the nodes: %q %q %q", on("n1"), on("n2"), on("n3"))
	}
	find("n1", "a", "a", false)
	find("n2", "a", "a", false)
	find("n1", "hash", "m", false)
	find("n2", "hash", "", false)
	find("n1", "x", "", false)
	done, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		node, namespace, account string
		want                     bool
	}{{"n1", "shop", "web", true}, {"n2", "shop", "web", false}, {"n1", "other", "web", false}, {"n1", "shop", "db", false}, {"n3", "shop", "web", false}} {
		if got := p.AwaitAccount(done, test.node, test.namespace, test.account) != nil; got != test.want {
			t.Errorf("%v: %v", test, got)
		}
	}

	pods.Set(simplePod(t, "c", "shop", "web", "n2", "")) // bound by now
	pods.Delete(simplePod(t, "a", "shop", "web", "n1", ""))
	pods.Delete(simplePod(t, "m", "kube-system", "", "n1", mirror))
	if on("n1") != "" || on("n2") != "b c" || len(p.byNode) != 1 {
		t.Errorf("on the nodes: %q %q", on("n1"), on("n2"))
	}
	find("n1", "a", "", true)
	find("n1", "hash", "", false) // a kubelet makes the copy again with another UID
	pods.Set(podOf(t, `{"metadata":{"uid":"b","namespace":"shop"},"spec":{"nodeName":"n2","serviceAccountName":"db"},"status":{"phase":"Failed"}}`))
	if p.AwaitAccount(done, "n2", "shop", "db") != nil {
		t.Error("a pod that has failed runs")
	}

	// A list is the whole truth: what is not on it was deleted while nobody listened.
	pods.Replace([]*Pod{simplePod(t, "c", "shop", "web", "n2", ""), simplePod(t, "d", "shop", "web", "n1", "")})
	find("n2", "b", "", true)
	find("n2", "c", "c", false)
	find("n1", "d", "d", false)
	if all, _ := p.Len(); all != 2 {
		t.Errorf("%d pods", all)
	}
	nodes.Set(nodeName{"n3", "nu3"})
	nodes.Delete(nodeName{"n2", "nu2"})
	if p.NodeUID("n1") != "nu1" || p.NodeUID("n2") != "" || p.NodeUID("n3") != "nu3" {
		t.Errorf("nodes %v", p.nodeUIDs)
	}
	nodes.Replace([]nodeName{{"n1", "again"}})
	if p.NodeUID("n1") != "again" || p.NodeUID("n3") != "" {
		t.Errorf("nodes %v", p.nodeUIDs)
	}
}

func TestPodsAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, pods, nodes := newIndex(t)
		any := func(*Pod) bool { return true }
		await := func(uid string, until func(*Pod) bool) (<-chan string, context.CancelFunc) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			told := make(chan string, 1)
			go func() {
				defer cancel()
				found, was := p.AwaitPod(ctx, "n1", uid, until)
				told <- fmt.Sprint(found != nil, was)
			}()
			synctest.Wait()
			return told, cancel
		}
		want := func(told <-chan string, text string) {
			t.Helper()
			start := time.Now()
			if got := <-told; got != text || time.Since(start) != 0 {
				t.Errorf("%s after %v, want %s at once", got, time.Since(start), text)
			}
		}
		a, _ := await("a", any)
		second, _ := await("a", any)
		pods.Set(simplePod(t, "b", "shop", "web", "n1", ""))
		pods.Set(simplePod(t, "a", "shop", "web", "n1", ""))
		want(a, "true false")
		want(second, "true false")
		known, _ := await("a", any)
		want(known, "true false")

		labeled, _ := await("a", func(p *Pod) bool { return len(p.labels) > 0 })
		pods.Set(simplePod(t, "a", "shop", "web", "n1", ""))
		synctest.Wait()
		pods.Set(simplePod(t, "a", "shop", "web", "n1", `,"labels":{"a":"b"}`))
		want(labeled, "true false")

		deleted, _ := await("c", any)
		pods.Delete(simplePod(t, "c", "shop", "web", "n1", ""))
		want(deleted, "false true")

		static, _ := await("hash", any)
		pods.Set(simplePod(t, "m", "kube-system", "", "n1", `,"annotations":{"kubernetes.io/config.mirror":"hash"},"ownerReferences":[{"kind":"Node","name":"n1","uid":"x","controller":true}]`))
		want(static, "true false")

		listed, _ := await("l", any)
		pods.Replace([]*Pod{simplePod(t, "l", "shop", "web", "n1", "")})
		want(listed, "true false")

		gaveUp, cancel := await("never", any)
		cancel()
		want(gaveUp, "false false")
		start := time.Now()
		late, _ := await("never", any)
		if got := <-late; got != "false false" || time.Since(start) != time.Second {
			t.Errorf("%s after %v", got, time.Since(start))
		}

		uid := make(chan string, 1)
		go func() { uid <- p.AwaitNode(t.Context(), "n1") }()
		synctest.Wait()
		nodes.Set(nodeName{"n1", "nu1"})
		want(uid, "nu1")

		runs := make(chan string, 1)
		go func() { runs <- p.AwaitAccount(t.Context(), "n1", "shop", "new").UID }()
		synctest.Wait()
		pods.Set(simplePod(t, "e", "shop", "other", "n1", ""))
		pods.Set(simplePod(t, "f", "shop", "new", "n1", ""))
		want(runs, "f")
		pods.Set(simplePod(t, "0", "shop", "new", "n1", `,"creationTimestamp":"2999-01-01T00:00:00Z"`))
		if got := p.AwaitAccount(t.Context(), "n1", "shop", "new").UID; got != "f" {
			t.Errorf("the oldest pod is %s", got)
		}
		if len(p.waiting) != 0 || len(p.waits) != 0 || p.total != 0 {
			t.Errorf("somebody is left: %v %v %d", p.waiting, p.waits, p.total)
		}
	})
}

// A node that makes pods up takes nobody else's place.
func TestPodsAwaitIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, pods, _ := newIndex(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		until := func(*Pod) bool { return true }
		for i := range maxWaitingNode {
			go p.AwaitPod(ctx, "hostile", fmt.Sprint("u", i), until)
		}
		synctest.Wait()
		p.AwaitPod(ctx, "hostile", "one more", until)
		if ctx.Err() != nil {
			t.Fatal("one more has waited")
		}
		found := make(chan bool, 1)
		go func() {
			pod, _ := p.AwaitPod(ctx, "honest", "a", until)
			found <- pod != nil
		}()
		synctest.Wait()
		pods.Set(simplePod(t, "a", "shop", "web", "honest", ""))
		if !<-found || ctx.Err() != nil {
			t.Error("another node's pod was not waited for")
		}
	})
}

func TestTombstones(t *testing.T) {
	var g tombstones
	start := time.Now()
	g.add("a", start)
	g.add("b", start.Add(time.Minute))
	g.add("a", start.Add(2*time.Minute)) // seen and deleted again
	if !g.has("a", start.Add(11*time.Minute)) || g.has("b", start.Add(11*time.Minute)) || g.has("c", start) {
		t.Error("remembered wrongly")
	}
	g.add("c", start.Add(11*time.Minute+30*time.Second))
	if _, ok := g.at["a"]; !ok || len(g.at) != 2 {
		t.Errorf("left: %v", g.at)
	}
	for i := range maxTombstones + 10 {
		g.add(fmt.Sprint(i), start.Add(12*time.Minute))
	}
	if len(g.at) != maxTombstones || len(g.order) != maxTombstones {
		t.Errorf("%d and %d are kept", len(g.at), len(g.order))
	}
}
