package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/meshid/meshid/test/local"
)

// StartFakeNodes adds nodes that kwok plays, and pods on them that are said to run:
// a fleet of thousands at the price of its objects. Pod i is on node i modulo nodes,
// in a new namespace that all of them share, with service account app-0 to app-9 and
// label app of the same name. A pod that is deleted, or created on one of the nodes
// (node-0 and so on, with the namespace's name before it), is dealt with until the
// test ends.
func (s *APIServer) StartFakeNodes(t testing.TB, nodes, pods int) []Pod {
	t.Helper()
	kwok := local.Run(t, s.program("kwok"), "--kubeconfig="+s.Kubeconfig, "--config="+s.program("kwok.yaml"),
		"--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", "--node-lease-duration-seconds=40")
	namespace := s.Namespace(t)
	for i := range min(accounts, max(1, pods)) {
		s.ensureAccount(t, namespace, account(i))
	}
	g, ctx := errgroup.WithContext(t.Context())
	g.SetLimit(16)
	node := func(i int) string { return fmt.Sprintf("%s-node-%d", namespace, i%nodes) }
	for i := range nodes {
		g.Go(func() error {
			return s.Do(ctx, http.MethodPost, "/api/v1/nodes", object{"metadata": object{
				"name": node(i), "annotations": object{"kwok.x-k8s.io/node": "fake"},
			}}, nil)
		})
	}
	created := make([]Pod, pods)
	for i := range created {
		g.Go(func() error {
			p, err := s.createPod(ctx, Pod{
				Namespace: namespace, Name: fmt.Sprint("pod-", i), ServiceAccount: account(i), Node: node(i), Labels: map[string]string{"app": account(i)},
			})
			created[i] = p
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	local.Await(t, "wait until the pods are said to run", func(ctx context.Context) error {
		select {
		case <-kwok.Done():
			t.Fatalf("kwok has ended:\n%s", kwok.Log())
		default:
		}
		var waiting struct {
			Items []struct{} `json:"items"`
		}
		err := s.Do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/pods?limit=1&fieldSelector=status.phase!%3DRunning", nil, &waiting)
		if err == nil && len(waiting.Items) > 0 {
			err = errors.New("some are not")
		}
		return err
	})
	return created
}

const accounts = 10

func account(i int) string { return fmt.Sprint("app-", i%accounts) }
