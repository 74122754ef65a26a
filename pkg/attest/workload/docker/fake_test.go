package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/test/fakes/containers"
)

var (
	id   = containers.ID
	next = containers.Next
)

// fakeContainer is a container of the fake engine.
type fakeContainer struct {
	ID, Name, Image, Ref string
	Labels               map[string]string
	Running              bool
	Pid                  int
	StartedAt            time.Time
}

// fakeEngine answers as the Docker engine does, on a Unix socket.
type fakeEngine struct {
	socket string
	server *http.Server

	mu         sync.Mutex
	containers map[string]*fakeContainer
	images     map[string]map[string]string
	log        []string             // events, for since
	streams    map[chan string]bool // open event streams
	hang       chan struct{}        // if set, calls wait for it
	calls      map[string]int
	raw        map[string]string // answers by path instead of the real ones
}

func newFakeEngine(t testing.TB) *fakeEngine {
	t.Helper()
	e := &fakeEngine{
		socket:     filepath.Join(t.TempDir(), "docker.sock"),
		containers: map[string]*fakeContainer{},
		images:     map[string]map[string]string{},
		streams:    map[chan string]bool{},
		calls:      map[string]int{},
		raw:        map[string]string{},
	}
	e.listen(t)
	t.Cleanup(e.stop)
	return e
}

// listen starts the engine; stop kills it, its containers go on.
func (e *fakeEngine) listen(t testing.TB) {
	t.Helper()
	l, err := net.Listen("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", e.events)
	mux.HandleFunc("GET /containers/json", e.list)
	mux.HandleFunc("GET /containers/{id}/json", e.inspect)
	mux.HandleFunc("GET /images/{id}/json", e.image)
	e.server = &http.Server{Handler: mux}
	go e.server.Serve(l)
}

func (e *fakeEngine) stop() { _ = e.server.Close() }

// enter is the beginning of each call.
func (e *fakeEngine) enter(w http.ResponseWriter, r *http.Request, call string) (done bool) {
	e.mu.Lock()
	e.calls[call]++
	hang, raw := e.hang, e.raw[r.URL.Path]
	e.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-r.Context().Done():
			return true
		}
	}
	if raw != "" {
		_, _ = w.Write([]byte(raw))
		return true
	}
	return false
}

func (e *fakeEngine) list(w http.ResponseWriter, r *http.Request) {
	if e.enter(w, r, "list") {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	list := []map[string]any{}
	for _, c := range e.containers {
		if c.Running {
			list = append(list, map[string]any{"Id": c.ID, "Names": []string{"/" + c.Name}})
		}
	}
	_ = json.NewEncoder(w).Encode(list)
}

func (e *fakeEngine) inspect(w http.ResponseWriter, r *http.Request) {
	if e.enter(w, r, "inspect") {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.containers[r.PathValue("id")]
	if c == nil {
		http.Error(w, `{"message":"No such container"}`, http.StatusNotFound)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"Id": c.ID, "Name": "/" + c.Name, "Image": c.Image,
		"Config": map[string]any{"Image": c.Ref, "Labels": c.Labels, "Env": []string{"PASSWORD=canary"}},
		"State":  map[string]any{"Running": c.Running, "Pid": c.Pid, "StartedAt": c.StartedAt.Format(time.RFC3339Nano)},
	})
}

func (e *fakeEngine) image(w http.ResponseWriter, r *http.Request) {
	if e.enter(w, r, "image") {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	labels, ok := e.images[r.PathValue("id")]
	if !ok {
		http.Error(w, `{"message":"No such image"}`, http.StatusNotFound)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"Id": r.PathValue("id"), "Config": map[string]any{"Labels": labels}})
}

func (e *fakeEngine) events(w http.ResponseWriter, r *http.Request) {
	if e.enter(w, r, "events") {
		return
	}
	var filters map[string][]string
	since, err := strconv.ParseInt(r.URL.Query().Get("since"), 10, 64)
	if err := errors.Join(err, json.Unmarshal([]byte(r.URL.Query().Get("filters")), &filters)); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if d := time.Since(time.Unix(since, 0)); d < 0 || d > time.Minute {
		http.Error(w, "bad since", http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush() // as the real one, before it subscribes
	ch := make(chan string, 1000)
	e.mu.Lock()
	for _, line := range e.log {
		ch <- line
	}
	e.streams[ch] = true
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.streams, ch)
	}()
	for {
		select {
		case line, ok := <-ch:
			if !ok {
				return
			}
			if _, err := w.Write([]byte(line)); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// emit sends an event to all streams. e.mu is held.
func (e *fakeEngine) emit(action, id string) {
	line := fmt.Sprintf(`{"status":%q,"Type":"container","Action":%q,"Actor":{"ID":%q,"Attributes":{"name":"x"}},"timeNano":1}`+"\n", action, action, id)
	e.log = append(e.log, line)
	for ch := range e.streams {
		ch <- line
	}
}

// drop ends the open streams.
func (e *fakeEngine) drop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for ch := range e.streams {
		close(ch)
		delete(e.streams, ch)
	}
}

func (e *fakeEngine) start(c *fakeContainer) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.Image == "" {
		c.Image = "sha256:" + strings.Repeat("1", 64)
	}
	if _, ok := e.images[c.Image]; !ok {
		e.images[c.Image] = nil
	}
	c.Running = true
	c.StartedAt = time.Now()
	e.containers[c.ID] = c
	e.emit("create", c.ID)
	e.emit("start", c.ID)
}

func (e *fakeEngine) die(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers[id].Running = false
	e.containers[id].Pid = 0
	e.emit("die", id)
}

func (e *fakeEngine) set(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
}

func (e *fakeEngine) count(call string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.calls[call]
}

// world is an attestor, its engine and its processes.
type world struct {
	t         testing.TB
	attestor  *Attestor
	engine    *fakeEngine
	processes *containers.Processes
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, engine: newFakeEngine(t), processes: containers.NewProcesses()}
	a, err := New(Config{Socket: w.engine.socket}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	a.processes = w.processes
	w.attestor = a
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// process starts a process with this cgroup file.
func (w *world) process(cgroup string) (p *peer.Peer, end func()) {
	w.t.Helper()
	return w.processes.Start(w.t, cgroup)
}

// container starts a container whose init process has this cgroup file.
func (w *world) container(name, cgroup string, change func(*fakeContainer)) (init *peer.Peer, end func()) {
	w.t.Helper()
	init, end = w.process(cgroup)
	c := &fakeContainer{ID: id(name), Name: name, Ref: "registry.internal/shop/" + name + ":1", Pid: init.PID, Labels: map[string]string{"app": name}}
	if change != nil {
		change(c)
	}
	w.engine.start(c)
	return init, end
}

// v2 is a cgroup file of cgroup v2.
func v2(path string) string { return "0::" + path + "\n" }

// v1 is a cgroup file with the same path in the hierarchies of Docker, and
// others that it does not manage.
func v1(path string) string {
	return "9:name=systemd:" + path + "\n8:pids:" + path + "\n4:memory:" + path + "\n2:cpu,cpuacct:" + path + "\n1:misc:/\n0::/\n"
}

// watch runs Watch and returns its events.
func (w *world) watch() <-chan attest.InstanceEvent {
	w.t.Helper()
	return containers.Watch(w.t, w.attestor)
}
