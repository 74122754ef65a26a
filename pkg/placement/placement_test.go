package placement

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/server"
	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

const patience = time.Minute

// digests of images.
var digestA, digestB = "sha256:" + strings.Repeat("a", 64), "sha256:" + strings.Repeat("b", 64)

// podText is a pod web of namespace shop, on node n1, with one container whose id and
// digest the node has reported.
func podText(uid, node, more string) string {
	return fmt.Sprintf(`{"metadata":{"uid":%q,"namespace":"shop","name":%q,"labels":{"app":"web"},"ownerReferences":[{"kind":"ReplicaSet","name":"web","uid":"rs","controller":true}]%s},
		"spec":{"nodeName":%q,"serviceAccountName":"web","containers":[{"name":"app","image":"r.internal/app:1"}]},
		"status":{"phase":"Running","containerStatuses":[{"name":"app","containerID":"containerd://c-%s","image":"full/app:1","imageID":"r.internal/app@%s"}]}}`, uid, uid, more, node, uid, digestA)
}

func nodeText(name, uid string) string {
	return fmt.Sprintf(`{"metadata":{"name":%q,"uid":%q}}`, name, uid)
}

// claim is what an honest agent says of the container of podText.
func claim(uid string, change ...func(*attributesv1.Kubernetes)) *attributesv1.Workload {
	k := &attributesv1.Kubernetes{
		Namespace: "shop", ServiceAccount: "web", PodName: uid, PodUid: uid, Labels: map[string]string{"app": "web"},
		OwnerKind: "ReplicaSet", OwnerName: "web", OwnerUid: "rs",
		Container: "app", ContainerId: "c-" + uid, Image: "r.internal/app:1", ImageDigest: digestA,
	}
	for _, c := range change {
		c(k)
	}
	return &attributesv1.Workload{Unix: &attributesv1.Unix{Uid: 7}, K8S: k}
}

func nodeOf(cluster, name, uid string) *attributesv1.Node {
	return &attributesv1.Node{Method: "k8s_psat", Id: uid, K8S: &attributesv1.K8SNode{Cluster: cluster, Name: name, Uid: uid}}
}

// follow runs the pods of a server until the test ends.
func follow(t *testing.T, api *kubeapi.Server, name string) *kube.Pods {
	t.Helper()
	client, err := kube.Open(kube.Config{Name: name, Kubeconfig: api.Kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	pods, err := kube.NewPods(client, nil)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() { pods.Run(t.Context()) })
	t.Cleanup(done.Wait)
	return pods
}

// until waits for what will be so.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end, look := time.After(patience), time.NewTicker(time.Millisecond)
	defer look.Stop()
	for !ok() {
		select {
		case <-look.C:
		case <-end:
			t.Fatalf("%s: not so after %v", what, patience)
		}
	}
}

// current waits until pods know all of their cluster.
func current(t *testing.T, pods *kube.Pods) {
	t.Helper()
	until(t, "the pods are current", func() bool {
		p, n := pods.State()
		return p.Current && n.Current
	})
}

func behind(t *testing.T, pods *kube.Pods) {
	t.Helper()
	until(t, "the pods are behind", func() bool {
		_, why := pods.Behind(time.Now())
		return why != nil
	})
}

// one places one workload.
func one(t *testing.T, p *Placement, node *attributesv1.Node, w *attributesv1.Workload) server.Placed {
	t.Helper()
	placed := p.Place(t.Context(), node, []*attributesv1.Workload{w})
	if len(placed) != 1 {
		t.Fatalf("%d answers", len(placed))
	}
	return placed[0]
}

func expect(t *testing.T, what string, got server.Placed, want server.PlacementVerdict, why string) {
	t.Helper()
	if got.Verdict != want || !strings.Contains(got.Why, why) || why == "" && got.Why != "" {
		t.Errorf("%s: %s, because %q; want %s, %q", what, verdictNames[got.Verdict], got.Why, verdictNames[want], why)
	}
}

func newPlacement(t *testing.T, c Config) *Placement {
	t.Helper()
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const (
	verified = server.PlacementVerified
	refused  = server.PlacementRefuted
	later    = server.PlacementUnknown
	believed = server.PlacementClaimed
)

// What is verified has the cluster's own facts, whatever the agent says.
func TestV_E9_FactsAreTheClusters(t *testing.T) {
	api := kubeapi.New(t)
	api.Set("nodes", nodeText("n1", "nu1"))
	api.Set("pods", podText("a", "n1", ""))
	api.Set("pods", strings.ReplaceAll(podText("new", "n1", ""), `"status"`, `"ignored"`))
	pods := follow(t, api, "prod")
	current(t, pods)
	p := newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Pods: pods}}})
	for name, test := range map[string]struct{ claimed, facts *attributesv1.Workload }{
		"the truth": {claim("a"), claim("a")},
		"labels, owner, digest": {claim("a", func(k *attributesv1.Kubernetes) {
			k.Labels = map[string]string{"app": "admin", "more": "x"}
			k.OwnerKind, k.OwnerName, k.OwnerUid, k.ImageDigest = "Job", "admin", "x", digestB
		}), claim("a")},
		"of the pod as a whole": {
			claim("a", func(k *attributesv1.Kubernetes) { k.Container = "" }),
			claim("a", func(k *attributesv1.Kubernetes) { k.Container, k.ContainerId, k.Image, k.ImageDigest = "", "", "", "" }),
		},
		"the runtime's name of the image": {
			claim("a", func(k *attributesv1.Kubernetes) { k.Image = "full/app:1" }), // which the node itself has reported
			claim("a", func(k *attributesv1.Kubernetes) { k.Image = "" }),
		},
		"without image": {
			claim("a", func(k *attributesv1.Kubernetes) { k.Image, k.ImageDigest = "", "" }),
			claim("a", func(k *attributesv1.Kubernetes) { k.Image = "" }),
		},
		"without id": {
			claim("a", func(k *attributesv1.Kubernetes) { k.ContainerId, k.ImageDigest = "", digestB }),
			claim("a", func(k *attributesv1.Kubernetes) { k.ContainerId = "" }),
		},
		"not reported yet": {
			claim("new", func(k *attributesv1.Kubernetes) { k.ImageDigest = digestB }),
			claim("new", func(k *attributesv1.Kubernetes) { k.ImageDigest = digestB }),
		},
	} {
		got := one(t, p, nodeOf("prod", "n1", "nu1"), test.claimed)
		expect(t, name, got, verified, "")
		if diff := cmp.Diff(test.facts, got.Workload, protocmp.Transform()); diff != "" {
			t.Errorf("%s: facts (-want +got):\n%s", name, diff)
		}
	}
}

func TestV_E1_PodsOfOtherNodes(t *testing.T) {
	api := kubeapi.New(t)
	for _, n := range []string{"n1", "n2"} {
		api.Set("nodes", nodeText(n, "u-"+n))
	}
	api.Set("pods", podText("a", "n1", ""))
	api.Set("pods", podText("b", "n2", ""))
	api.Set("pods", podText("unbound", "", ""))
	api.Set("pods", strings.Replace(podText("done", "n1", ""), "Running", "Succeeded", 1))
	api.Set("pods", podText("ending", "n1", `,"deletionTimestamp":"2999-01-01T00:00:00Z"`))
	api.Set("pods", podText("lost", "n1", `,"deletionTimestamp":"2020-01-01T00:00:00Z"`))
	for _, namespace := range []string{"kube-system", "shop"} {
		api.Set("pods", `{"metadata":{"uid":"m-`+namespace+`","namespace":"`+namespace+`","name":"static-n1","labels":{"app":"web"},
			"annotations":{"kubernetes.io/config.mirror":"hash-`+namespace+`"},"ownerReferences":[{"kind":"Node","name":"n1","uid":"u-n1","controller":true}]},
			"spec":{"nodeName":"n1","containers":[{"name":"app","image":"r.internal/app:1"}]},"status":{"phase":"Running"}}`)
	}
	pods := follow(t, api, "prod")
	current(t, pods)
	p := newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Pods: pods, Policy: Seen, StaticPods: []string{"kube-system"}}, {Name: "trusted", Policy: Off}}, Wait: time.Millisecond})
	set := func(change func(*attributesv1.Kubernetes)) *attributesv1.Workload { return claim("a", change) }
	n1 := nodeOf("prod", "n1", "u-n1")
	static := func(namespace, uid string) *attributesv1.Workload {
		return claim(uid, func(k *attributesv1.Kubernetes) {
			k.Namespace, k.PodName, k.ServiceAccount = namespace, "static-n1", ""
		})
	}
	for name, test := range map[string]struct {
		node    *attributesv1.Node
		w       *attributesv1.Workload
		verdict server.PlacementVerdict
		why     string
	}{
		"its own":                   {n1, claim("a"), verified, ""},
		"another node's":            {n1, claim("b"), refused, "runs on node n2"},
		"its own, another node":     {nodeOf("prod", "n2", "u-n2"), claim("a"), refused, "runs on node n1"},
		"made up":                   {n1, claim("x"), later, "has no pod x"},
		"none":                      {n1, claim(""), refused, "names no pod"},
		"endless":                   {n1, claim(strings.Repeat("x", 200)), refused, "names no pod"},
		"not bound":                 {n1, claim("unbound"), later, "not bound"},
		"has ended":                 {n1, claim("done"), refused, "has ended"},
		"in its grace":              {n1, claim("ending"), verified, ""},
		"was to be gone":            {n1, claim("lost"), refused, "has ended"},
		"other namespace":           {n1, set(func(k *attributesv1.Kubernetes) { k.Namespace = "admin" }), refused, "is shop/a"},
		"other account":             {n1, set(func(k *attributesv1.Kubernetes) { k.ServiceAccount = "admin" }), refused, `account "web"`},
		"other image":               {n1, set(func(k *attributesv1.Kubernetes) { k.Image = "evil" }), later, "asks for the image r.internal/app:1"},
		"other name":                {n1, set(func(k *attributesv1.Kubernetes) { k.PodName = "b" }), refused, "is shop/a"},
		"other container":           {n1, set(func(k *attributesv1.Kubernetes) { k.Container = "debug" }), later, "container debug"},
		"other id":                  {n1, set(func(k *attributesv1.Kubernetes) { k.ContainerId = "c-b" }), later, "for its container app"},
		"static":                    {n1, static("kube-system", "hash-kube-system"), believed, "its node's word"},
		"static, another node":      {nodeOf("prod", "n2", "u-n2"), static("kube-system", "hash-kube-system"), later, "has no pod hash"},
		"static, among others'":     {n1, static("shop", "hash-shop"), refused, "static_pods: [shop]"},
		"static, by its other UID":  {n1, static("shop", "m-shop"), refused, "static_pods: [shop]"},
		"its node was made again":   {nodeOf("prod", "n1", "u-old"), claim("a"), refused, "another one by now"},
		"its node was never there":  {nodeOf("prod", "n9", "u-n9"), claim("a"), later, "has no node n9"},
		"no UID of its node":        {nodeOf("prod", "n1", ""), claim("a"), verified, ""},
		"a cluster of no placement": {nodeOf("trusted", "n1", "x"), claim("x"), believed, "placement is off"},
		"another cluster":           {nodeOf("other", "n1", "u-n1"), claim("a"), refused, `"other" is not one`},
		"not of Kubernetes":         {&attributesv1.Node{Method: "x509pop", Id: "n1"}, claim("a"), refused, "not known to be one of a cluster"},
	} {
		expect(t, name, one(t, p, test.node, test.w), test.verdict, test.why)
	}
	// A batch has its answers in order.
	answers := p.Place(t.Context(), n1, []*attributesv1.Workload{claim("b"), claim("a"), claim("x")})
	if len(answers) != 3 || answers[0].Verdict != refused || answers[1].Verdict != verified || answers[2].Verdict != later {
		t.Errorf("a batch: %+v", answers)
	}
}

// Nodes that attest otherwise are those of a cluster that an operator says they are.
func TestLabeledNodes(t *testing.T) {
	api := kubeapi.New(t)
	api.Set("nodes", nodeText("n1", "u-n1"))
	api.Set("pods", podText("a", "n1", ""))
	pods := follow(t, api, "prod")
	current(t, pods)
	config := Config{Clusters: []Cluster{{Name: "dev", Policy: Off, NodeLabel: "dev-node"}, {Name: "prod", Pods: pods, NodeLabel: "prod-node"}, {Name: "more", Policy: Off}}, Wait: time.Millisecond}
	p := newPlacement(t, config)
	labeled := func(key, value string) *attributesv1.Node {
		return &attributesv1.Node{Method: "x509pop", Id: "m1", Labels: map[string]string{key: value}}
	}
	expect(t, "labeled", one(t, p, labeled("prod-node", "n1"), claim("a")), verified, "")
	expect(t, "labeled as another", one(t, p, labeled("prod-node", "n2"), claim("a")), refused, "runs on node n1")
	expect(t, "labeled otherwise", one(t, p, labeled("node", "n1"), claim("a")), refused, "not known to be one")
	expect(t, "of an empty name", one(t, p, labeled("prod-node", ""), claim("a")), refused, "not known to be one")
	expect(t, "of an empty label", one(t, p, labeled("", "n1"), claim("a")), refused, "not known to be one")
	config.BelieveOthers = true
	p = newPlacement(t, config)
	expect(t, "believed", one(t, p, labeled("node", "n1"), claim("a")), believed, "not known to be one")
	expect(t, "of a cluster that is asked", one(t, p, labeled("prod-node", "n2"), claim("a")), refused, "runs on node n1")
}

// A pod that the cluster has not told of yet is waited for, by event.
func TestPodIsAwaited(t *testing.T) {
	api := kubeapi.New(t)
	pods := follow(t, api, "prod")
	p := newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Pods: pods}}, Wait: patience})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	answers := make(chan server.Placed, 1)
	ask := func(w *attributesv1.Workload) {
		go func() { answers <- p.Place(ctx, nodeOf("prod", "n1", "nu1"), []*attributesv1.Workload{w})[0] }()
	}
	ask(claim("a")) // before anything is read
	current(t, pods)
	api.Set("nodes", nodeText("n1", "nu1"))
	api.Set("pods", podText("a", "", ""))
	api.Set("pods", podText("a", "n1", ""))
	expect(t, "a new pod", <-answers, verified, "")

	restarted := claim("a", func(k *attributesv1.Kubernetes) { k.ContainerId = "c-again" })
	ask(restarted)
	api.Set("pods", strings.Replace(podText("a", "n1", ""), "c-a", "c-again", 1))
	expect(t, "a container that was started again", <-answers, verified, "")

	ask(claim("b"))
	api.Set("pods", podText("b", "n2", ""))
	expect(t, "a new pod elsewhere", <-answers, refused, "runs on node n2")

	ask(claim("never"))
	cancel()
	expect(t, "a call that was given up", <-answers, later, "has no pod never")
}

// A pod that was deleted has no identity any more, and neither has another one of the
// same name its own.
func TestDeletedPods(t *testing.T) {
	api := kubeapi.New(t)
	api.Set("nodes", nodeText("n1", "nu1"))
	api.Set("pods", podText("a", "n1", ""))
	api.Set("pods", podText("b", "n1", ""))
	pods := follow(t, api, "prod")
	current(t, pods)
	p := newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Pods: pods, Policy: Seen}}, Wait: patience})
	n1 := nodeOf("prod", "n1", "nu1")
	expect(t, "before", one(t, p, n1, claim("a")), verified, "")
	api.Delete("pods", "shop", "a")
	api.Set("pods", strings.Replace(podText("a", "n1", ""), `"uid":"a"`, `"uid":"a2"`, 1)) // as a StatefulSet does
	until(t, "the deletion is known", func() bool { _, was := pods.Find("n1", "a"); return was })
	expect(t, "deleted", one(t, p, n1, claim("a")), refused, "was deleted")
	again := claim("a", func(k *attributesv1.Kubernetes) { k.PodUid = "a2" })
	expect(t, "made again", one(t, p, n1, again), verified, "")

	// Also while nobody listens.
	api.Down(true)
	until(t, "the feed has ended", func() bool { s, _ := pods.State(); return !s.Current })
	api.Delete("pods", "shop", "b")
	api.Forget()
	api.Down(false)
	current(t, pods)
	expect(t, "deleted unheard", one(t, p, n1, claim("b")), refused, "was deleted")
}

// A feed that is dead takes nothing back. What was seen goes on as the policy says, what
// is new is refused, and what is known to be wrong stays so.
func TestFault_F65_FeedIsDead(t *testing.T) {
	api := kubeapi.New(t)
	for _, n := range []string{"n1", "n2"} {
		api.Set("nodes", nodeText(n, "u-"+n))
	}
	api.Set("pods", podText("a", "n1", ""))
	api.Set("pods", podText("b", "n2", ""))
	api.Set("pods", podText("gone", "n1", ""))
	pods := follow(t, api, "prod")
	current(t, pods)
	api.Delete("pods", "shop", "gone")
	until(t, "the deletion is known", func() bool { _, was := pods.Find("n1", "gone"); return was })
	clusters := func(policy Policy) Config {
		return Config{Clusters: []Cluster{{Name: "prod", Pods: pods, Policy: policy}}, Wait: patience}
	}
	seen, strict := newPlacement(t, clusters(Seen)), newPlacement(t, clusters(Strict))
	n1 := nodeOf("prod", "n1", "u-n1")

	api.Down(true)
	until(t, "the feed has ended", func() bool { s, _ := pods.State(); return !s.Current })
	expect(t, "a watch that is opened again", one(t, seen, n1, claim("a")), verified, "")
	behind(t, pods)
	all, _ := pods.Len()
	if all != 2 {
		t.Errorf("%d pods are known, want 2", all)
	}
	for name, p := range map[string]*Placement{"seen": seen, "strict": strict} {
		expect(t, name+": elsewhere", one(t, p, n1, claim("b")), refused, "runs on node n2")
		expect(t, name+": deleted", one(t, p, n1, claim("gone")), refused, "was deleted")
		expect(t, name+": new", one(t, p, n1, claim("new")), later, "has not been seen")
		expect(t, name+": a node that was made again", one(t, p, nodeOf("prod", "n1", "old"), claim("a")), refused, "another one by now")
		expect(t, name+": another account", one(t, p, n1, claim("a", func(k *attributesv1.Kubernetes) { k.ServiceAccount = "admin" })), refused, "account")
	}
	got := one(t, seen, n1, claim("a", func(k *attributesv1.Kubernetes) { k.Labels = map[string]string{"app": "admin"} }))
	expect(t, "seen before", got, believed, "has not been heard since")
	if got.Workload.GetK8S().GetLabels()["app"] != "web" {
		t.Errorf("the agent's labels count: %v", got.Workload)
	}
	expect(t, "seen before, strict", one(t, strict, n1, claim("a")), later, "has not been heard since")

	api.Set("pods", podText("new", "n1", ""))
	api.Down(false)
	expect(t, "after it came back", func() server.Placed { current(t, pods); return one(t, strict, n1, claim("new")) }(), verified, "")
}

// A cluster that was never heard knows nothing, and nothing is waited for.
func TestFault_F65_NeverHeard(t *testing.T) {
	api := kubeapi.New(t)
	api.Set("pods", podText("a", "n1", ""))
	api.Down(true)
	pods := follow(t, api, "prod")
	until(t, "the refusal is known", func() bool { s, _ := pods.State(); return s.Err != nil })
	p := newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Pods: pods, Policy: Seen}}, Wait: time.Hour})
	expect(t, "never heard", one(t, p, nodeOf("prod", "n1", "nu1"), claim("a")), later, "has not been seen")
}

func BenchmarkPlace(b *testing.B) {
	api := kubeapi.New(b)
	api.Set("nodes", nodeText("n1", "nu1"))
	api.Set("pods", podText("a", "n1", ""))
	client, err := kube.Open(kube.Config{Name: "prod", Kubeconfig: api.Kubeconfig})
	if err != nil {
		b.Fatal(err)
	}
	pods, err := kube.NewPods(client, nil)
	if err != nil {
		b.Fatal(err)
	}
	go pods.Run(b.Context())
	if found, _ := pods.AwaitPod(b.Context(), "n1", "a", func(*kube.Pod) bool { return true }); found == nil {
		b.Fatal("no pod")
	}
	p, err := New(Config{Clusters: []Cluster{{Name: "prod", Pods: pods}}})
	if err != nil {
		b.Fatal(err)
	}
	node, workloads := nodeOf("prod", "n1", "nu1"), []*attributesv1.Workload{claim("a")}
	b.ReportAllocs()
	for b.Loop() {
		if p.Place(b.Context(), node, workloads)[0].Verdict != verified {
			b.Fatal("not verified")
		}
	}
}

// A cluster that was not heard since the CA was started: what is in its ledger counts as
// seen, as it was verified there and for as long as what was issued then is good, and
// nothing after the cluster has been heard.
func TestFault_F65_NeverHeardAgain(t *testing.T) {
	api := kubeapi.New(t)
	api.Set("nodes", nodeText("n1", "nu1"))
	api.Down(true)
	pods := follow(t, api, "prod")
	until(t, "the refusal is known", func() bool { s, _ := pods.State(); return s.Err != nil })
	clusters := func(policy Policy) *Placement {
		return newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Pods: pods, Policy: policy}, {Name: "dev", Pods: pods, Policy: Seen}}, Wait: patience})
	}
	now := time.Now()
	n1 := nodeOf("prod", "n1", "nu1")
	records := []Verified{
		{n1, claim("b").GetK8S(), now.Add(time.Hour)},
		{n1, claim("a", func(k *attributesv1.Kubernetes) { k.Labels = map[string]string{"app": "older"} }).GetK8S(), now.Add(time.Minute)},
		{n1, claim("a").GetK8S(), now.Add(time.Hour)},
		{n1, claim("expired").GetK8S(), now.Add(-time.Second)},
		{n1, claim("").GetK8S(), now.Add(time.Hour)},
		{nodeOf("gone", "n1", "nu1"), claim("a").GetK8S(), now.Add(time.Hour)},
		{&attributesv1.Node{Method: "x509pop", Id: "m"}, claim("a").GetK8S(), now.Add(time.Hour)},
	}
	seen, strict := clusters(Seen), clusters(Strict)
	expect(t, "before it is recalled", one(t, seen, n1, claim("a")), later, "has not been seen")
	for _, p := range []*Placement{seen, strict} {
		p.Recall(slices.Values(records), now)
	}
	got := one(t, seen, n1, claim("a", func(k *attributesv1.Kubernetes) { k.Labels, k.ImageDigest = map[string]string{"app": "admin"}, digestB }))
	expect(t, "verified before", got, believed, "it was verified before this CA was started")
	if diff := cmp.Diff(claim("a"), got.Workload, protocmp.Transform()); diff != "" {
		t.Errorf("facts (-want +got):\n%s", diff)
	}
	change := func(f func(*attributesv1.Kubernetes)) *attributesv1.Workload { return claim("a", f) }
	for name, c := range map[string]struct {
		got     server.Placed
		verdict server.PlacementVerdict
		why     string
	}{
		"strict":                      {one(t, strict, n1, claim("a")), later, "has not been seen"},
		"another cluster":             {one(t, seen, nodeOf("dev", "n1", "nu1"), claim("a")), later, "has not been seen"},
		"another node":                {one(t, seen, nodeOf("prod", "n2", "nu2"), claim("a")), later, "has not been seen"},
		"the name of its node":        {one(t, seen, nodeOf("prod", "n1", "nu2"), claim("a")), later, "has not been seen"},
		"a new pod":                   {one(t, seen, n1, claim("c")), later, "has not been seen"},
		"one that held nothing valid": {one(t, seen, n1, claim("expired")), later, "has not been seen"},
		"started again":               {one(t, seen, n1, change(func(k *attributesv1.Kubernetes) { k.ContainerId = "c-x" })), later, "has not been seen"},
		"another container of it":     {one(t, seen, n1, change(func(k *attributesv1.Kubernetes) { k.Container = "x" })), later, "has not been seen"},
		"another account":             {one(t, seen, n1, change(func(k *attributesv1.Kubernetes) { k.ServiceAccount = "x" })), refused, "service account"},
		"another namespace":           {one(t, seen, n1, change(func(k *attributesv1.Kubernetes) { k.Namespace = "x" })), refused, "service account"},
	} {
		expect(t, name, c.got, c.verdict, c.why)
	}

	// It has been deleted meanwhile, which counts when the cluster is heard, and then for
	// good.
	api.Set("pods", podText("b", "n1", ""))
	api.Down(false)
	current(t, pods)
	p := newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Pods: pods, Policy: Seen}}, Wait: time.Millisecond})
	p.Recall(slices.Values(records), now)
	expect(t, "deleted meanwhile", one(t, p, n1, claim("a")), later, "has no pod a")
	expect(t, "there", one(t, p, n1, claim("b")), verified, "")
	api.Down(true)
	behind(t, pods)
	expect(t, "deleted meanwhile, and away again", one(t, seen, n1, claim("a")), later, "has not been seen")
	expect(t, "seen again", one(t, seen, n1, claim("b")), believed, "has not been heard since")
}

// What is recalled is bounded.
func TestRecallIsBounded(t *testing.T) {
	p := newPlacement(t, Config{Clusters: []Cluster{{Name: "prod", Policy: Seen}}})
	p.Recall(func(yield func(Verified) bool) {
		for i := range maxRecalled + 10 {
			for range 2 {
				if !yield(Verified{nodeOf("prod", "n1", "nu1"), &attributesv1.Kubernetes{PodUid: fmt.Sprint(i)}, time.Now().Add(time.Hour)}) {
					return
				}
			}
		}
	}, time.Now())
	if n := len(*p.recalled["prod"].Load()); n != maxRecalled {
		t.Errorf("%d workloads are remembered, want %d", n, maxRecalled)
	}
}
