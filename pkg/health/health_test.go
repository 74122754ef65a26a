package health

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestConditions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		tracker, err := New(prometheus.NewRegistry(), "meshid_test", "b", "a", "c")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // fake time
		tracker.Set("b", Warning, "slow")
		tracker.Set("c", Error, "down")
		tracker.Set("unheard of", Error, "ignored")
		time.Sleep(time.Minute)
		tracker.Set("b", Warning, "slower")
		want := []Condition{
			{Name: "c", Severity: Error, Message: "down", Since: start.Add(time.Minute)},
			{Name: "b", Severity: Warning, Message: "slower", Since: start.Add(time.Minute)},
			{Name: "a", Since: start},
		}
		if diff := cmp.Diff(want, tracker.Conditions()); diff != "" {
			t.Error(diff)
		}
		tracker.Clear("c")
		if c := tracker.Conditions()[0]; c.Name != "b" {
			t.Errorf("worst is %s after c was cleared", c.Name)
		}
	})
}

func TestEndpointsAndMetric(t *testing.T) {
	registry := prometheus.NewRegistry()
	tracker, err := New(registry, "meshid_test", "store", "ledger")
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	tracker.Register(mux)
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, w.Body.String()
	}
	if code, _ := get("/readyz"); code != http.StatusOK {
		t.Errorf("/readyz is %d while all is well", code)
	}
	tracker.Set("store", Warning, "slow")
	if code, _ := get("/readyz"); code != http.StatusOK {
		t.Errorf("/readyz is %d with a warning", code)
	}
	tracker.Set("ledger", Error, "disk full")
	code, body := get("/readyz")
	if code != http.StatusServiceUnavailable || !strings.Contains(body, "disk full") {
		t.Errorf("/readyz is %d with an error: %s", code, body)
	}
	if code, _ := get("/livez"); code != http.StatusOK {
		t.Errorf("/livez is %d with an error", code)
	}
	var parsed struct {
		Conditions []Condition `json:"conditions"`
	}
	if err := json.Unmarshal([]byte(body), &parsed); err != nil || parsed.Conditions[0].Severity != Error {
		t.Errorf("%v: %s", err, body)
	}
	if err := json.Unmarshal([]byte(`{"conditions":[{"severity":"fine"}]}`), &parsed); err == nil {
		t.Error("read a severity that does not exist")
	}
	want := `
# HELP meshid_test_condition State of a named condition: 0 ok, 1 warning, 2 error.
# TYPE meshid_test_condition gauge
meshid_test_condition{condition="ledger"} 2
meshid_test_condition{condition="store"} 1
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	if _, err := New(registry, "meshid_test", "x"); err == nil {
		t.Error("a second tracker of the same name was registered")
	}
}
