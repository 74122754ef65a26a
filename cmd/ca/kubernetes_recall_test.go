package main

import (
	"iter"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	attributesv1 "github.com/meshid/meshid/proto/attributes/v1"
	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/health"
	"github.com/meshid/meshid/pkg/ledger"
	"github.com/meshid/meshid/pkg/placement"
	"github.com/meshid/meshid/pkg/server"
	"github.com/meshid/meshid/test/fakes/kubeapi"
)

// F65: a CA that starts while a cluster is away takes what the cluster had said from its
// ledger, and only that.
func TestFault_F65_RecallFromLedger(t *testing.T) {
	dir, logger, reg := t.TempDir(), slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	journal, err := ledger.Open(ledgerDir(dir), ledger.Options{Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := journal.Close(); err != nil {
			t.Error(err)
		}
	})
	node := &attributesv1.Node{Method: "k8s_psat", Id: "prod.nu1", K8S: &attributesv1.K8SNode{Cluster: "prod", Name: "n1", Uid: "nu1"}}
	workload := func(uid string) *attributesv1.Workload {
		return &attributesv1.Workload{K8S: &attributesv1.Kubernetes{Namespace: "shop", ServiceAccount: "web", PodName: uid, PodUid: uid, Container: "app", ContainerId: "c-" + uid}}
	}
	// Each pod is named after what is wrong with its record.
	for uid, change := range map[string]func(*ledgerv1.Record){
		"good":     func(*ledgerv1.Record) {},
		"claimed":  func(r *ledgerv1.Record) { r.VerifiedBy = "agent" },
		"refused":  func(r *ledgerv1.Record) { r.Outcome = ledgerv1.Outcome_OUTCOME_REFUSED },
		"ended":    func(r *ledgerv1.Record) { r.Event = ledgerv1.Event_EVENT_INSTANCE_ENDED },
		"expired":  func(r *ledgerv1.Record) { r.Certificate.NotAfter = timestamppb.New(time.Now().Add(-time.Minute)) },
		"nameless": func(r *ledgerv1.Record) { r.Workload = nil },
	} {
		r := &ledgerv1.Record{
			Version: 1, Time: timestamppb.Now(), Event: ledgerv1.Event_EVENT_ISSUE, Outcome: ledgerv1.Outcome_OUTCOME_SUCCESS, VerifiedBy: "ca",
			Node: &ledgerv1.NodeRef{Attributes: node}, Workload: workload(uid),
			Certificate: &ledgerv1.Certificate{NotAfter: timestamppb.New(time.Now().Add(time.Hour))},
		}
		change(r)
		if _, err := journal.Append(t.Context(), ledger.NewDraft(r, nil)); err != nil {
			t.Fatal(err)
		}
	}
	feedMetrics, err := ledger.NewFeedMetrics(reg)
	if err != nil {
		t.Fatal(err)
	}
	tracker, err := health.New(reg, "meshid_ca", conditionSearch)
	if err != nil {
		t.Fatal(err)
	}
	index := openSearch(t.Context(), dir, journal, feedMetrics, tracker, reg, logger)
	t.Cleanup(func() {
		if err := index.close(); err != nil {
			t.Error(err)
		}
	})

	started := func(away bool, verified iter.Seq2[placement.Verified, error]) *clusters {
		api := kubeapi.New(t)
		api.Down(away)
		client, err := kube.Open(kube.Config{Name: "prod", Kubeconfig: api.Kubeconfig})
		if err != nil {
			t.Fatal(err)
		}
		pods, err := kube.NewPods(client, nil)
		if err != nil {
			t.Fatal(err)
		}
		p, err := placement.New(placement.Config{Clusters: []placement.Cluster{{Name: "prod", Pods: pods, Policy: placement.Seen}}, Wait: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		var done sync.WaitGroup
		done.Go(func() { pods.Run(t.Context()) })
		t.Cleanup(done.Wait)
		c := &clusters{pods: []clusterPods{{name: "prod", pods: pods}}, placement: p}
		c.recall(t.Context(), verified, logger)
		return c
	}
	away := started(true, index.verified(t.Context(), journal))
	for _, uid := range []string{"good", "claimed", "refused", "ended", "expired", "nameless", "new"} {
		want := server.PlacementUnknown
		if uid == "good" {
			want = server.PlacementClaimed
		}
		if got := away.placement.Place(t.Context(), node, []*attributesv1.Workload{workload(uid)})[0]; got.Verdict != want {
			t.Errorf("%s: verdict %v (%s), want %v", uid, got.Verdict, got.Why, want)
		}
	}
	started(false, func(func(placement.Verified, error) bool) { t.Error("the ledger is read while the cluster is there") })

	// An index that is away is no reason to stop.
	started(true, (&searchIndex{}).verified(t.Context(), journal))
}
