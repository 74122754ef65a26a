package k8s

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// The messages are k8s.io/cri-api's: they are the definition, need nothing but gRPC,
// and add 0.6 MB to the agent.

// usualSockets are where runtimes listen for the kubelet.
var usualSockets = []string{
	"/run/containerd/containerd.sock",
	"/run/crio/crio.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/k0s/containerd.sock",
	"/var/snap/microk8s/common/run/containerd.sock",
	"/run/cri-dockerd.sock",
}

const (
	// callTimeout bounds each call to the runtime. One that hangs costs this much,
	// and then an error.
	callTimeout = 2 * time.Second
	// maxAnswer bounds an answer, in bytes; that about one container holds its
	// runtime configuration, of some ten thousand, a list some hundred a container.
	maxAnswer = 16 << 20
	// maxCalls bounds the calls that are under way.
	maxCalls = 8
)

// errRuntime says that the runtime did not answer, or not sensibly. It may be asked
// again.
var errRuntime = errors.New("the container runtime does not answer, try again")

// Labels that the kubelet gives to each container that it has made.
const (
	labelPodUID    = "io.kubernetes.pod.uid"
	labelPodName   = "io.kubernetes.pod.name"
	labelNamespace = "io.kubernetes.pod.namespace"
	labelContainer = "io.kubernetes.container.name"
)

// runtime is a client of the container runtime. It is safe for concurrent use.
type runtime struct {
	sockets []string
	metrics *metrics
	timeout time.Duration
	slots   chan struct{} // one for each call under way

	mu     sync.Mutex // guards what follows
	conn   *grpc.ClientConn
	closed bool
}

func newRuntime(socket string, m *metrics) *runtime {
	sockets := usualSockets
	if socket != "" {
		sockets = []string{socket}
	}
	return &runtime{sockets: sockets, metrics: m, timeout: callTimeout, slots: make(chan struct{}, maxCalls)}
}

func (r *runtime) close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	if r.conn == nil {
		return nil
	}
	conn := r.conn
	r.conn = nil
	return conn.Close()
}

// running is what the runtime says of a container that runs, or is about to.
type running struct {
	pid       int
	startedAt time.Time
	sandbox   string
	// For whom the kubelet had it made.
	podUID, podName, namespace, container string
	// The image reference as it was asked for; "" if the runtime does not tell.
	requested string
	// The runtime's own name of the image, and its content address.
	image, digest string
}

// connect returns the connection to the runtime, and looks for one if there is none
// yet.
func (r *runtime) connect(ctx context.Context) (*grpc.ClientConn, error) {
	r.mu.Lock()
	conn, closed := r.conn, r.closed
	r.mu.Unlock()
	if conn != nil {
		return conn, nil
	}
	if closed {
		return nil, errors.New("the attestor is closed")
	}
	var tried []error
	for _, socket := range r.sockets {
		conn, err := r.dial(ctx, socket)
		if err != nil {
			if len(r.sockets) == 1 || !errors.Is(err, os.ErrNotExist) {
				tried = append(tried, fmt.Errorf("%s: %w", socket, err))
			}
			continue
		}
		return r.keep(conn)
	}
	if len(tried) == 0 {
		return nil, fmt.Errorf("no socket of a container runtime is there; mount it, or set runtime_socket (looked for %s)", strings.Join(r.sockets, ", "))
	}
	return nil, errors.Join(tried...)
}

// dial connects to the runtime at a socket, if one answers there.
func (r *runtime) dial(ctx context.Context, socket string) (conn *grpc.ClientConn, err error) {
	if _, err := os.Stat(socket); err != nil {
		return nil, err
	}
	conn, err = grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a socket of root's
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: callTimeout,
		}))
	if err != nil {
		return nil, err
	}
	defer func() { r.metrics.called(callVersion, err) }()
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	// A containerd whose CRI is switched off listens as well, and does not know this.
	if _, err := cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{}); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// keep keeps a connection for all, unless another came first.
func (r *runtime) keep(conn *grpc.ClientConn) (*grpc.ClientConn, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return nil, errors.Join(errors.New("the attestor is closed"), conn.Close())
	case r.conn != nil:
		return r.conn, conn.Close()
	}
	r.conn = conn
	return conn, nil
}

// call makes one bounded call.
func (r *runtime) call(ctx context.Context, c call, f func(context.Context, cri.RuntimeServiceClient) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return fmt.Errorf("%s: %w: %w", c, errRuntime, ctx.Err())
	}
	conn, err := r.connect(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", errRuntime, err)
	}
	defer func() { r.metrics.called(c, err) }()
	err = f(ctx, cri.NewRuntimeServiceClient(conn))
	switch {
	case status.Code(err) == codes.NotFound:
		return fmt.Errorf("%s: %w", c, container.ErrNotFound)
	case err != nil:
		return fmt.Errorf("%s: %w: %w", c, errRuntime, err)
	}
	return nil
}

// list returns the ids of all containers that run.
func (r *runtime) list(ctx context.Context) (ids []string, err error) {
	err = r.call(ctx, callList, func(ctx context.Context, c cri.RuntimeServiceClient) error {
		answer, err := c.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
			State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING},
		}})
		for _, found := range answer.GetContainers() {
			if !container.IsID(found.GetId()) {
				return fmt.Errorf("%.100q is not a container id", found.GetId())
			}
			ids = append(ids, found.GetId())
		}
		return err
	})
	return ids, err
}

// errCreated says that a container has been made and has not been started yet.
var errCreated = errors.New("the container has not been started yet, try again")

// container asks for a container that runs, or whose init process has been made, as
// events may have told; made is nil if they have not. The error wraps
// container.ErrNotFound, errCreated or errRuntime.
func (r *runtime) container(ctx context.Context, id string, made *task) (*running, error) {
	if !container.IsID(id) {
		return nil, fmt.Errorf("container %.100q: not a container id", id)
	}
	var answer *cri.ContainerStatusResponse
	err := r.call(ctx, callStatus, func(ctx context.Context, c cri.RuntimeServiceClient) (err error) {
		answer, err = c.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
		return err
	})
	if err != nil {
		return nil, err
	}
	s := answer.GetStatus()
	if s.GetId() != id { // a runtime also finds a container by the beginning of its id
		return nil, container.ErrNotFound
	}
	switch s.GetState() {
	case cri.ContainerState_CONTAINER_RUNNING:
	case cri.ContainerState_CONTAINER_CREATED:
		if made == nil {
			return nil, errCreated
		}
	case cri.ContainerState_CONTAINER_EXITED:
		return nil, container.ErrNotFound
	default:
		return nil, fmt.Errorf("%w: it does not know the state of container %s", errRuntime, container.Short(id))
	}
	// Of the rest, which is the runtime's own configuration of the container with its
	// environment, nothing is decoded.
	var verbose struct {
		Pid       int    `json:"pid"`
		SandboxID string `json:"sandboxID"`
		Config    struct {
			Image struct {
				Requested string `json:"user_specified_image"`
			} `json:"image"`
		} `json:"config"`
	}
	err = json.Unmarshal([]byte(answer.GetInfo()["info"]), &verbose)
	pid, startedAt := verbose.Pid, time.Unix(0, s.GetStartedAt())
	if s.GetState() == cri.ContainerState_CONTAINER_CREATED {
		pid, startedAt = made.pid, made.made
	}
	if err != nil || pid <= 0 {
		return nil, fmt.Errorf("the container runtime does not tell the process of container %s: containerd and CRI-O do", container.Short(id))
	}
	labels := s.GetLabels()
	found := &running{
		pid: pid, startedAt: startedAt, sandbox: verbose.SandboxID,
		podUID: labels[labelPodUID], podName: labels[labelPodName], namespace: labels[labelNamespace], container: labels[labelContainer],
		requested: cmp.Or(s.GetImage().GetUserSpecifiedImage(), verbose.Config.Image.Requested), image: s.GetImage().GetImage(),
		digest: digestOf(s.GetImageRef(), s.GetImageId()),
	}
	if found.podUID == "" || found.container == "" {
		return nil, container.ErrNotFound // somebody else's than the kubelet's
	}
	return found, nil
}

// digestOf returns the content address in an image's references: that of the
// registry ("name@sha256:…") before the runtime's own.
func digestOf(references ...string) string {
	for _, r := range references {
		_, d, at := strings.Cut(r, "@")
		if !at {
			d = r
		}
		if hash, ok := strings.CutPrefix(d, "sha256:"); ok && container.IsID(hash) {
			return d
		}
	}
	return ""
}

// reference returns the image reference that the pod asked for when the container was
// made. Newer runtimes tell it. Of older ones only their own name of the image is
// known; the pod's is as good if it means the same. The pod's alone is not: it can be
// changed while the old container runs.
func (r *running) reference(inPod string) string {
	switch {
	case r.requested != "":
		return r.requested
	case fullReference(inPod) == fullReference(r.image):
		return inPod
	default:
		return r.image
	}
}

// fullReference writes an image reference in full, as the runtimes do.
func fullReference(r string) string {
	first, _, path := strings.Cut(r, "/")
	switch {
	case !path:
		r = "docker.io/library/" + r
	case !strings.ContainsAny(first, ".:") && first != "localhost":
		r = "docker.io/" + r
	}
	if !strings.ContainsAny(r[strings.LastIndexByte(r, '/')+1:], ":@") {
		r += ":latest"
	}
	return r
}
