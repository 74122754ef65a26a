// Package kubeapi stands for a Kubernetes API server in tests that break it: it has
// pods and nodes, which can be listed and watched, and it refuses, goes silent and
// forgets when it is told to. What a real one says is what test/kube shows.
package kubeapi

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// Server is an API server. Its methods may be called concurrently.
type Server struct {
	// Kubeconfig is the path of a kubeconfig for it.
	Kubeconfig string

	mu      sync.Mutex // guards what follows
	version int
	objects map[string]object // by collection, namespace and name
	history []event
	changed chan struct{} // closed when something of this changes
	down    bool
	held    map[string]bool // collections of which nothing is said
}

type object struct {
	collection string
	fields     map[string]any
	version    int
}

type event struct {
	object
	kind string
}

// New starts a server, which ends with the test.
func New(t testing.TB) *Server {
	t.Helper()
	s := &Server{objects: map[string]object{}, held: map[string]bool{}, changed: make(chan struct{}), version: 1}
	web := httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	web.EnableHTTP2 = true
	web.StartTLS()
	t.Cleanup(web.CloseClientConnections)
	t.Cleanup(web.Close)
	t.Cleanup(func() { s.Down(true) })
	s.Kubeconfig = Kubeconfig(t, web)
	return s
}

// Kubeconfig writes the kubeconfig of a server that speaks TLS, and returns its path.
func Kubeconfig(t testing.TB, server *httptest.Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: fake, cluster: {server: %q, certificate-authority-data: %s}}]
contexts: [{name: fake, context: {cluster: fake}}]
current-context: fake
`, server.URL, base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// change makes a change that watches hear of.
func (s *Server) change(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	close(s.changed)
	s.changed = make(chan struct{})
}

// Set adds or changes an object of a collection, "pods" or "nodes", given as JSON.
func (s *Server) Set(collection, text string) {
	var fields map[string]any
	if err := json.Unmarshal([]byte(text), &fields); err != nil {
		panic(err)
	}
	s.change(func() {
		key := keyOf(collection, fields)
		kind := "ADDED"
		if _, ok := s.objects[key]; ok {
			kind = "MODIFIED"
		}
		s.version++
		o := object{collection, fields, s.version}
		s.objects[key] = o
		s.history = append(s.history, event{o, kind})
	})
}

// Delete deletes an object.
func (s *Server) Delete(collection, namespace, name string) {
	s.change(func() {
		key := collection + "/" + namespace + "/" + name
		o, ok := s.objects[key]
		if !ok {
			panic("no " + key)
		}
		delete(s.objects, key)
		s.version++
		o.version = s.version
		s.history = append(s.history, event{o, "DELETED"})
	})
}

// Down has the server answer 503, and end its watches; or come back.
func (s *Server) Down(down bool) { s.change(func() { s.down = down }) }

// Hold has the server say nothing about one collection, from now on.
func (s *Server) Hold(collection string) { s.change(func() { s.held[collection] = true }) }

// Forget has the server not remember what has changed: whoever was not there lists
// again.
func (s *Server) Forget() { s.change(func() { s.history = nil }) }

func keyOf(collection string, fields map[string]any) string {
	m, _ := fields["metadata"].(map[string]any)
	namespace, _ := m["namespace"].(string)
	return fmt.Sprintf("%s/%s/%s", collection, namespace, m["name"])
}

func (o object) text() string {
	fields := maps.Clone(o.fields)
	m := map[string]any{"resourceVersion": strconv.Itoa(o.version)}
	if meta, ok := fields["metadata"].(map[string]any); ok {
		maps.Copy(m, meta)
	}
	fields["metadata"] = m
	text, err := json.Marshal(fields)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// serve answers watches that begin with a list, and those that go on.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	collection := strings.TrimPrefix(r.URL.Path, "/api/v1/")
	q := r.URL.Query()
	s.mu.Lock()
	down := s.down
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	if down || !q.Has("watch") {
		status(w, http.StatusServiceUnavailable, "ServiceUnavailable")
		return
	}
	flusher := w.(http.Flusher) //nolint:forcetypeassert // it is one
	flusher.Flush()
	seen := -1
	if q.Get("sendInitialEvents") == "" {
		var err error
		if seen, err = strconv.Atoi(q.Get("resourceVersion")); err != nil {
			return
		}
	}
	for {
		s.mu.Lock()
		var lines []string
		next := s.changed
		switch {
		case s.down:
			s.mu.Unlock()
			return
		case s.held[collection]:
		case seen < 0:
			for _, o := range s.objects {
				if o.collection == collection {
					lines = append(lines, fmt.Sprintf(`{"type":"ADDED","object":%s}`, o.text()))
				}
			}
			lines = append(lines, fmt.Sprintf(`{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}}}}`, s.version))
			seen = s.version
		case seen < s.version && (len(s.history) == 0 || s.history[0].version > seen+1):
			lines = append(lines, `{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","code":410,"reason":"Expired","message":"too old"}}`)
			seen = s.version
		default:
			for _, e := range s.history {
				if e.version > seen && e.collection == collection {
					lines = append(lines, fmt.Sprintf(`{"type":%q,"object":%s}`, e.kind, e.text()))
				}
			}
			seen = s.version
		}
		s.mu.Unlock()
		for _, line := range lines {
			if _, err := fmt.Fprintln(w, line); err != nil {
				return
			}
		}
		flusher.Flush()
		select {
		case <-next:
		case <-r.Context().Done():
			return
		}
	}
}

func status(w http.ResponseWriter, code int, reason string) {
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q,"message":"the server is down"}`, code, reason)
}
