package k8s

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/meshid/meshid/pkg/attest"
	"github.com/meshid/meshid/pkg/attest/peer"
	"github.com/meshid/meshid/test/fakes/containers"
)

var (
	id   = containers.ID
	next = containers.Next
)

// uid makes the UID of a pod.
func uid(name string) string {
	h := (fmt.Sprintf("%x", name) + strings.Repeat("0", 32))[:32]
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

const digest = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// object is a JSON object.
type object = map[string]any

// fakeKubelet answers as a kubelet does, over TLS.
type fakeKubelet struct {
	server *httptest.Server

	mu    sync.Mutex
	pods  map[string]object // by UID
	calls int
	hang  chan struct{} // if set, calls wait for it
	code  int           // answered instead
	raw   string        // answered instead
	token string        // that is wanted
}

func newFakeKubelet(t testing.TB) *fakeKubelet {
	t.Helper()
	k := &fakeKubelet{pods: map[string]object{}, token: "good"}
	k.server = httptest.NewUnstartedServer(k)
	k.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	k.server.StartTLS()
	t.Cleanup(k.server.Close)
	return k
}

func (k *fakeKubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	k.calls++
	hang, code, raw, token := k.hang, k.code, k.raw, k.token
	items := []object{}
	for _, p := range k.pods {
		items = append(items, p)
	}
	body, err := json.Marshal(object{"kind": "PodList", "apiVersion": "v1", "metadata": object{}, "items": items})
	k.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-r.Context().Done():
			return
		}
	}
	switch {
	case err != nil || r.URL.Path != "/pods" || r.Method != http.MethodGet:
		http.Error(w, "bad request", http.StatusBadRequest)
	case code != 0:
		w.WriteHeader(code)
	case r.TLS != nil && r.Header.Get("Authorization") != "Bearer "+token:
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
	case raw != "":
		_, _ = w.Write([]byte(raw))
	default:
		_, _ = w.Write(body)
	}
}

func (k *fakeKubelet) set(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

func (k *fakeKubelet) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.calls
}

// fakePod is a pod as the kubelet lists it, with secrets that must not come out.
func fakePod(name string, labels map[string]string, containers ...string) object {
	all, statuses := []object{}, []object{}
	for _, c := range containers {
		all = append(all, object{
			"name": c, "image": "registry.internal/shop/" + c + ":1",
			"env": []object{{"name": "PASSWORD", "value": "canary"}},
		})
	}
	return object{
		"metadata": object{
			"name": name, "namespace": "shop", "uid": uid(name), "labels": labels,
			"annotations":     object{"kubernetes.io/config.seen": "x"},
			"ownerReferences": []object{{"kind": "ReplicaSet", "name": name + "-rs", "uid": uid(name + "-rs"), "controller": true}},
		},
		"spec":   object{"serviceAccountName": name + "-sa", "containers": all},
		"status": object{"phase": "Running", "containerStatuses": statuses},
	}
}

// fakeContainer is a container of the fake runtime.
type fakeContainer struct {
	status  *cri.ContainerStatus
	pid     int
	sandbox string
	info    string // instead of the usual
}

// fakeRuntime answers as containerd does.
type fakeRuntime struct {
	cri.UnimplementedRuntimeServiceServer

	socket string
	server *grpc.Server

	mu         sync.Mutex
	containers map[string]*fakeContainer
	calls      map[string]int // of ContainerStatus by id, of others by name
	hang       chan struct{}
	err        error
	events     map[chan []byte]bool // open streams of events; nil if there are none at all
}

func newFakeRuntime(t testing.TB) *fakeRuntime {
	t.Helper()
	r := &fakeRuntime{
		socket:     filepath.Join(t.TempDir(), "cri.sock"),
		containers: map[string]*fakeContainer{},
		calls:      map[string]int{},
	}
	r.listen(t)
	t.Cleanup(r.stop)
	return r
}

func (r *fakeRuntime) listen(t testing.TB) {
	t.Helper()
	l, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	r.server = grpc.NewServer()
	cri.RegisterRuntimeServiceServer(r.server, r)
	r.server.RegisterService(&grpc.ServiceDesc{
		ServiceName: "containerd.services.events.v1.Events", HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: "Subscribe", ServerStreams: true, Handler: func(_ any, s grpc.ServerStream) error { return r.subscribe(s) }}},
	}, r)
	go func(s *grpc.Server) { _ = s.Serve(l) }(r.server)
}

func (r *fakeRuntime) stop() { r.server.Stop() }

func (r *fakeRuntime) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

func (r *fakeRuntime) count(name string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls[name]
}

// enter is the beginning of each call.
func (r *fakeRuntime) enter(ctx context.Context, name string) error {
	r.mu.Lock()
	r.calls[name]++
	hang, err := r.hang, r.err
	r.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

// subscribe is containerd's events.
func (r *fakeRuntime) subscribe(s grpc.ServerStream) error {
	request := &emptypb.Empty{} // which keeps what it does not know
	if err := s.RecvMsg(request); err != nil {
		return err
	}
	if got := string(request.ProtoReflect().GetUnknown()); !strings.HasSuffix(got, eventsFilter) {
		return status.Errorf(codes.InvalidArgument, "filter %q", got)
	}
	events, told := make(chan []byte, 1000), false
	r.set(func() {
		if told = r.events != nil; told {
			r.events[events] = true
		}
	})
	if !told {
		return status.Error(codes.Unimplemented, "unknown service")
	}
	defer r.set(func() { delete(r.events, events) })
	for {
		select {
		case e := <-events:
			message := &emptypb.Empty{}
			message.ProtoReflect().SetUnknown(e)
			if err := s.SendMsg(message); err != nil {
				return err
			}
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

// tell sends an event to who follows them; it waits until somebody does.
func (w *world) tell(event []byte) {
	w.t.Helper()
	until(w.t, "events are followed", func() (told bool) {
		w.runtime.set(func() {
			for stream := range w.runtime.events {
				stream <- event
				told = true
			}
		})
		return told
	})
}

// taskEvent is containerd's event of a task that was made.
func taskEvent(id string, pid int) []byte {
	message := func(to []byte, n protowire.Number, b []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(to, n, protowire.BytesType), b)
	}
	number := func(to []byte, n protowire.Number, v int64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(to, n, protowire.VarintType), uint64(v))
	}
	now := time.Now()
	task := message(message(nil, 1, []byte(id)), 2, []byte("/run/containerd/io.containerd.runtime.v2.task/k8s.io/"+id))
	task = number(message(task, 3, message(nil, 1, []byte("overlay"))), 6, int64(pid))
	e := message(nil, 1, number(number(nil, 1, now.Unix()), 2, int64(now.Nanosecond())))
	e = message(message(e, 2, []byte("k8s.io")), 3, []byte("/tasks/create"))
	return message(e, 4, message(message(nil, 1, []byte("containerd.events.TaskCreate")), 2, task))
}

func (r *fakeRuntime) Version(ctx context.Context, _ *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{Version: "v1"}, r.enter(ctx, "version")
}

func (r *fakeRuntime) ListContainers(ctx context.Context, q *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	if err := r.enter(ctx, "list"); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	answer := &cri.ListContainersResponse{}
	for id, c := range r.containers {
		if c.status.GetState() == q.GetFilter().GetState().GetState() {
			answer.Containers = append(answer.Containers, &cri.Container{Id: id})
		}
	}
	return answer, nil
}

func (r *fakeRuntime) ContainerStatus(ctx context.Context, q *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	if err := r.enter(ctx, q.GetContainerId()); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[q.GetContainerId()]
	if c == nil {
		return nil, status.Errorf(codes.NotFound, "container %q: not found", q.GetContainerId())
	}
	info := c.info
	if info == "" {
		b, err := json.Marshal(object{"pid": c.pid, "sandboxID": c.sandbox, "config": object{"envs": []object{{"key": "PASSWORD", "value": "canary"}}}, "runtimeSpec": object{"process": object{"env": []string{"PASSWORD=canary"}}}})
		if err != nil {
			return nil, err
		}
		info = string(b)
	}
	return &cri.ContainerStatusResponse{Status: proto.CloneOf(c.status), Info: map[string]string{"info": info}}, nil
}

// world is an attestor, the kubelet and runtime of its node, and processes.
type world struct {
	t         testing.TB
	attestor  *Attestor
	kubelet   *fakeKubelet
	runtime   *fakeRuntime
	processes *containers.Processes
	cgroups   string // root of the cgroup file system
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, kubelet: newFakeKubelet(t), runtime: newFakeRuntime(t), processes: containers.NewProcesses(), cgroups: t.TempDir()}
	dir := t.TempDir()
	ca, token := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "token")
	if err := errors.Join(
		os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.kubelet.server.Certificate().Raw}), 0o600),
		os.WriteFile(token, []byte("good\n"), 0o600),
		os.Mkdir(filepath.Join(w.cgroups, "kubepods"), 0o700)); err != nil {
		t.Fatal(err)
	}
	a, err := New(Config{
		Kubelet: w.kubelet.server.URL, NodeName: "example.com", KubeletCA: ca, TokenFile: token,
		RuntimeSocket: w.runtime.socket, CgroupRoot: w.cgroups,
	}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	a.processes = w.processes
	// The machine of a test may be slow; who wants to see a deadline pass sets one.
	a.wait, a.runtime.timeout, a.kubelet.timeout = time.Minute, time.Minute, time.Minute
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

// pod tells the kubelet of a pod, and no runtime of any container.
func (w *world) pod(name string, labels map[string]string, containers ...string) {
	w.kubelet.set(func() { w.kubelet.pods[uid(name)] = fakePod(name, labels, containers...) })
}

// container has the runtime run a container of a pod, whose init process has this
// cgroup file.
func (w *world) container(pod, name, containerID, cgroup string, change func(*fakeContainer)) (init *peer.Peer, end func()) {
	w.t.Helper()
	init, end = w.process(cgroup)
	c := &fakeContainer{
		pid: init.PID, sandbox: id(pod + "-sandbox"),
		status: &cri.ContainerStatus{
			Id: containerID, State: cri.ContainerState_CONTAINER_RUNNING, StartedAt: time.Now().UnixNano(),
			Image:    &cri.ImageSpec{Image: "registry.internal/shop/" + name + ":1"},
			ImageRef: "registry.internal/shop/" + name + "@" + digest, ImageId: "sha256:" + id("image"),
			Labels: map[string]string{labelPodUID: uid(pod), labelPodName: pod, labelNamespace: "shop", labelContainer: name},
		},
	}
	if change != nil {
		change(c)
	}
	w.runtime.set(func() { w.runtime.containers[containerID] = c })
	return init, end
}

// run makes a pod with one container of the pod's name, of cgroup v2.
func (w *world) run(name string) (init *peer.Peer, end func()) {
	w.t.Helper()
	w.pod(name, map[string]string{"app": name}, name)
	return w.container(name, name, id(name), cgroupOf(name), nil)
}

// cgroupOf is the cgroup file of run's containers.
func cgroupOf(name string) string {
	return "0::/kubepods/besteffort/pod" + uid(name) + "/" + id(name) + "\n"
}

// mkdir makes the cgroup of run's container, as a runtime does.
func (w *world) mkdir(name string) {
	w.t.Helper()
	_, path, _ := strings.Cut(strings.TrimSpace(cgroupOf(name)), "::")
	if err := os.MkdirAll(filepath.Join(w.cgroups, path), 0o700); err != nil {
		w.t.Fatal(err)
	}
}

// watch runs Watch and returns its events.
func (w *world) watch() <-chan attest.InstanceEvent {
	w.t.Helper()
	return containers.Watch(w.t, w.attestor)
}

// none wants no event to have come.
func none(t *testing.T, events <-chan attest.InstanceEvent) {
	t.Helper()
	select {
	case e := <-events:
		t.Errorf("event %v", e)
	default:
	}
}

// until waits until ok.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
		goruntime.Gosched()
	}
}

// attested attests a process that is known.
func (w *world) attested(p *peer.Peer) *attest.Facts {
	w.t.Helper()
	f, err := w.attestor.Attest(w.t.Context(), p)
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

// refused wants a refusal, which has all of these words.
func (w *world) refused(p *peer.Peer, words ...string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	f, err := w.attestor.Attest(ctx, p)
	if err == nil || f != nil || errors.Is(err, attest.ErrNotMine) {
		w.t.Errorf("facts %v, error %v, want a refusal", f, err)
		return
	}
	if slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(err.Error(), word) }) {
		w.t.Errorf("error %q, want one with %q", err, words)
	}
}
