package kube

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// Every client of a cluster counts, whoever has made it: TokenReviews by what became of
// them, and nothing that was refused without one.
func TestTokenReviewsAreCounted(t *testing.T) {
	i := newIssuer(t, "k1")
	var code atomic.Int32
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(int(code.Load()))
		_ = json.NewEncoder(w).Encode(values{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": values{
			"authenticated": true, "audiences": []string{"meshid"},
			"user": values{
				"username": "system:serviceaccount:meshid:agent", "uid": "sa-uid",
				"extra": values{"authentication.kubernetes.io/pod-name": []string{"agent-x"}, "authentication.kubernetes.io/pod-uid": []string{"pod-uid"}},
			},
		}})
	}))
	t.Cleanup(server.Close)
	path, _ := kubeconfig(t, server)
	reg := prometheus.NewRegistry()
	reviewer := func(cluster string) *Reviewer {
		c, err := Open(Config{Name: cluster, Kubeconfig: path, Registerer: reg})
		if err != nil {
			t.Fatal(err)
		}
		return NewReviewer(c)
	}
	agents, sidecars, other := reviewer("prod"), reviewer("prod"), reviewer("edge")
	code.Store(http.StatusCreated)
	verify := func(r *Reviewer, change func(values)) { _, _ = r.Verify(t.Context(), i.token(t, change), "meshid") }
	verify(agents, nil)
	verify(sidecars, nil)
	verify(sidecars, func(v values) { v["aud"] = "other" }) // not worth a question
	verify(agents, func(v values) { v["kubernetes.io"].(values)["pod"] = values{"name": "agent-x", "uid": "other"} })
	code.Store(http.StatusServiceUnavailable)
	verify(agents, nil)
	verify(other, nil)
	if err := testutil.GatherAndCompare(reg, strings.NewReader(`
# HELP meshid_ca_kubernetes_token_reviews_total Service account tokens that a cluster was asked about (TokenReview), by what became of them.
# TYPE meshid_ca_kubernetes_token_reviews_total counter
meshid_ca_kubernetes_token_reviews_total{cluster="edge",outcome="accepted"} 0
meshid_ca_kubernetes_token_reviews_total{cluster="edge",outcome="error"} 1
meshid_ca_kubernetes_token_reviews_total{cluster="edge",outcome="refused"} 0
meshid_ca_kubernetes_token_reviews_total{cluster="prod",outcome="accepted"} 2
meshid_ca_kubernetes_token_reviews_total{cluster="prod",outcome="error"} 1
meshid_ca_kubernetes_token_reviews_total{cluster="prod",outcome="refused"} 1
`), "meshid_ca_kubernetes_token_reviews_total"); err != nil {
		t.Error(err)
	}
}
