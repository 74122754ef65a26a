package k8s

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/meshid/meshid/internal/backoff"
	"github.com/meshid/meshid/pkg/attest/workload/container"
)

// containerd makes a container's init process ("task") and says so, with its pid, before
// it lets that process run the container's program. CRI says that a container runs only
// afterwards, when it has been written to the disk, and a program that has begun to run
// would have to wait for that. So containerd's own events are followed, on the socket at
// which it also speaks CRI; all versions have them, and their form is fixed
// (containerd/api, services/events/v1 and events). The few fields that are used are
// decoded here: the module would bring another RPC system along.

// task is a container's init process, as containerd has made it.
type task struct {
	id   string    // of the container
	pid  int       // 0 if it is not there yet: that of a container that goes on from a checkpoint
	made time.Time // the process was there by then
}

const (
	eventsMethod = "/containerd.services.events.v1.Events/Subscribe"
	// eventsFilter is containerd's filter language: those of Kubernetes' containers.
	eventsFilter = `namespace==k8s.io,topic=="/tasks/create"`
	// maxEvent bounds an event, in bytes; it lists the mounts of a container.
	maxEvent = 1 << 20
)

// eventsBackoff is between two streams of events.
var eventsBackoff = backoff.Policy{Base: 100 * time.Millisecond, Max: 5 * time.Second}

// errNoEvents says that the runtime is not containerd.
var errNoEvents = errors.New("the container runtime has no events of tasks")

// wire is a gRPC codec whose messages are bytes.
type wire struct{}

func (wire) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (wire) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (wire) Name() string                       { return "proto" }

// tasks calls made with each task that is made, until ctx ends or the stream does, of
// which the error says why; it wraps errNoEvents if there will never be any. opened is
// called when the stream is open: what was made before, or very soon after, is not told.
func (r *runtime) tasks(ctx context.Context, opened func(), made func(task)) (err error) {
	defer func() {
		if ctx.Err() == nil {
			r.metrics.called(callEvents, err)
		}
	}()
	connecting, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	conn, err := r.connect(connecting)
	if err != nil {
		return fmt.Errorf("%w: %w", errRuntime, err)
	}
	streaming, end := context.WithCancel(ctx)
	defer end()
	// It waits for a runtime that is being started again.
	stream, err := conn.NewStream(streaming, &grpc.StreamDesc{ServerStreams: true}, eventsMethod,
		grpc.ForceCodec(wire{}), grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxEvent))
	if err != nil {
		return fmt.Errorf("%w: %w", errRuntime, err)
	}
	request := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), eventsFilter)
	if err := errors.Join(stream.SendMsg(&request), stream.CloseSend()); err != nil {
		return fmt.Errorf("%w: %w", errRuntime, err)
	}
	opened()
	for {
		var event []byte
		err := stream.RecvMsg(&event)
		if status.Code(err) == codes.Unimplemented {
			return fmt.Errorf("%w: %w", errNoEvents, err)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errRuntime, err)
		}
		if t, ok := decodeTask(event); ok {
			made(t)
		}
	}
}

// decodeTask reads an Envelope with a TaskCreate in it. It is not ok if it is none, or of
// nothing that could be a container of a pod.
func decodeTask(envelope []byte) (t task, ok bool) {
	var seconds, nanos, pid uint64
	var topic, id string
	err := fields(envelope, func(n int, v uint64, b []byte) error {
		switch n {
		case 1: // timestamp
			return fields(b, func(n int, v uint64, _ []byte) error {
				switch n {
				case 1:
					seconds = v
				case 2:
					nanos = v
				}
				return nil
			})
		case 3:
			topic = string(b)
		case 4: // event, an Any
			return fields(b, func(n int, _ uint64, b []byte) error {
				if n != 2 { // value
					return nil
				}
				return fields(b, func(n int, v uint64, b []byte) error {
					switch n {
					case 1: // container_id
						id = string(b)
					case 6:
						pid = v
					}
					return nil
				})
			})
		}
		return nil
	})
	if err != nil || topic != "/tasks/create" || !container.IsID(id) || pid > maxPID || seconds > 1<<40 || nanos >= 1e9 {
		return task{}, false
	}
	return task{id: id, pid: int(pid), made: time.Unix(int64(seconds), int64(nanos))}, true
}

// maxPID is the kernel's (PID_MAX_LIMIT).
const maxPID = 1 << 22

// fields calls f with each field of a message: v is its value if it is a number, b if it
// has a length.
func fields(message []byte, f func(n int, v uint64, b []byte) error) error {
	for len(message) > 0 {
		number, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			return protowire.ParseError(size)
		}
		message = message[size:]
		var v uint64
		var b []byte
		switch kind {
		case protowire.VarintType:
			v, size = protowire.ConsumeVarint(message)
		case protowire.BytesType:
			b, size = protowire.ConsumeBytes(message)
		default:
			size = protowire.ConsumeFieldValue(number, kind, message)
		}
		if size < 0 {
			return protowire.ParseError(size)
		}
		message = message[size:]
		if err := f(int(number), v, b); err != nil {
			return err
		}
	}
	return nil
}
