package istio

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

// While a cluster cannot be heard, pods that were seen before are served, or nobody is, as
// its placement says.
func TestClusterThatIsNotHeard(t *testing.T) {
	api := kubeapi.New(t)
	api.Set("pods", `{"metadata":{"uid":"p1","namespace":"shop","name":"cart"},"spec":{"nodeName":"n1","serviceAccountName":"cart"},"status":{"phase":"Running"}}`)
	api.Hold("nodes") // which are never read
	client, err := kube.Open(kube.Config{Name: "prod", Kubeconfig: api.Kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	followed, err := kube.NewPods(client, nil)
	if err != nil {
		t.Fatal(err)
	}
	var done sync.WaitGroup
	done.Go(func() { followed.Run(t.Context()) })
	t.Cleanup(done.Wait)
	patience, look := time.After(time.Minute), time.NewTicker(time.Millisecond)
	defer look.Stop()
	for pods, _ := followed.State(); !pods.Current; pods, _ = followed.State() {
		select {
		case <-look.C:
		case <-patience:
			t.Fatal("pods are not read within a minute")
		}
	}
	for _, strict := range []bool{false, true} {
		pods := PodsOf(followed, strict)
		_, own := pods.Pod(t.Context(), "p1")
		_, other := pods.OnNode(t.Context(), "shop", "cart", "n1")
		waited, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := pods.OnNode(waited, "shop", "cart", "n2"); err == nil {
			t.Error("a pod of another node is found")
		}
		for call, err := range map[string]error{"Pod": own, "OnNode": other} {
			if (err != nil) != strict || errors.Is(err, ErrNoPod) {
				t.Errorf("%s, strict %t: %v", call, strict, err)
			}
		}
	}
}
