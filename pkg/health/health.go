// Package health keeps named conditions, each with a severity and since when it
// holds, and shows them as /livez, /readyz and a metric. It answers "is this
// program all right, and if not, what is not". It does not know what the
// conditions mean: each part reports its own.
package health

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Severity says how bad a condition is.
type Severity int

// Severities, from good to bad.
const (
	OK Severity = iota
	// Warning: degraded, will heal or can wait.
	Warning
	// Error: the program does not do its work; an operator must act.
	Error
)

// String returns "ok", "warning" or "error".
func (s Severity) String() string {
	switch s {
	case OK:
		return "ok"
	case Warning:
		return "warning"
	case Error:
		return "error"
	default:
		return "error"
	}
}

// MarshalText returns the severity's name.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads a severity's name.
func (s *Severity) UnmarshalText(text []byte) error {
	for _, known := range []Severity{OK, Warning, Error} {
		if known.String() == string(text) {
			*s = known
			return nil
		}
	}
	return fmt.Errorf("severity %q is unknown", text)
}

// Condition is one named state.
type Condition struct {
	Name     string    `json:"name"`
	Severity Severity  `json:"severity"`
	Message  string    `json:"message,omitempty"`
	Since    time.Time `json:"since"`
}

// Tracker holds the conditions of one program. All methods may be called
// concurrently.
type Tracker struct {
	desc *prometheus.Desc

	mu         sync.Mutex // guards what follows
	conditions map[string]Condition
}

// New returns a tracker that exposes its conditions as the gauge
// <prefix>_condition (0 ok, 1 warning, 2 error) on reg, with one series for each
// of names, which all start as ok. A name that is not in names cannot be
// reported: the set of series is closed.
func New(reg prometheus.Registerer, prefix string, names ...string) (*Tracker, error) {
	t := &Tracker{
		desc: prometheus.NewDesc(prefix+"_condition",
			"State of a named condition: 0 ok, 1 warning, 2 error.", []string{"condition"}, nil),
		conditions: make(map[string]Condition, len(names)),
	}
	now := time.Now()
	for _, n := range names {
		t.conditions[n] = Condition{Name: n, Since: now}
	}
	if err := reg.Register(t); err != nil {
		return nil, err
	}
	return t, nil
}

// Set reports a condition. Since moves only when the severity does. A name that
// New was not given is ignored.
func (t *Tracker) Set(name string, severity Severity, message string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, known := t.conditions[name]
	if !known {
		return
	}
	if c.Severity != severity {
		c.Since = time.Now()
	}
	c.Severity, c.Message = severity, message
	t.conditions[name] = c
}

// Clear reports a condition as ok.
func (t *Tracker) Clear(name string) { t.Set(name, OK, "") }

// Conditions returns all conditions, worst first, then by name.
func (t *Tracker) Conditions() []Condition {
	t.mu.Lock()
	all := make([]Condition, 0, len(t.conditions))
	for _, c := range t.conditions {
		all = append(all, c)
	}
	t.mu.Unlock()
	slices.SortFunc(all, func(a, b Condition) int {
		if a.Severity != b.Severity {
			return int(b.Severity) - int(a.Severity)
		}
		return strings.Compare(a.Name, b.Name)
	})
	return all
}

// Describe implements prometheus.Collector.
func (t *Tracker) Describe(ch chan<- *prometheus.Desc) { ch <- t.desc }

// Collect implements prometheus.Collector.
func (t *Tracker) Collect(ch chan<- prometheus.Metric) {
	for _, c := range t.Conditions() {
		ch <- prometheus.MustNewConstMetric(t.desc, prometheus.GaugeValue, float64(c.Severity), c.Name)
	}
}

// Register adds /livez and /readyz to mux. /livez answers 200 while the process
// can answer at all; /readyz answers 503 while a condition is an error. Both
// list the conditions as JSON.
func (t *Tracker) Register(mux *http.ServeMux) {
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { t.write(w, http.StatusOK) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		code := http.StatusOK
		if all := t.Conditions(); len(all) > 0 && all[0].Severity == Error {
			code = http.StatusServiceUnavailable
		}
		t.write(w, code)
	})
}

func (t *Tracker) write(w http.ResponseWriter, code int) {
	body, err := json.MarshalIndent(struct {
		Conditions []Condition `json:"conditions"`
	}{t.Conditions()}, "", "  ")
	if err != nil {
		http.Error(w, "encode conditions", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n'))
}
