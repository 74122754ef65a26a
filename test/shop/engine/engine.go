// Package engine speaks to a Docker engine over its Unix socket, and starts a
// private one where none runs. It answers "which containers are there, and make
// this one". It does not know what the containers are for.
//
// Only what the shop needs is here; the engine's command-line client is not
// used, so that nothing depends on its version or its output.
package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// DefaultSocket is where an engine that the machine's owner runs listens.
const DefaultSocket = "/var/run/docker.sock"

// callTimeout bounds each call; loading an image of 110 MB on a busy machine
// is the slowest of them.
const callTimeout = 2 * time.Minute

// ErrNotFound says that the engine has no such container or network.
var ErrNotFound = errors.New("not found")

// Engine is a client of one Docker engine. It is safe for concurrent use.
type Engine struct {
	// Socket is the path of the engine's API socket.
	Socket string

	client *http.Client
	daemon *daemon // nil if the engine is not ours
}

// Open returns a client of the engine that listens at socket.
func Open(socket string) *Engine {
	return &Engine{Socket: socket, client: &http.Client{Transport: &http.Transport{
		MaxIdleConns: 4,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// Find returns the engine that DOCKER_HOST names, or else the machine's own; it
// is an error if that one does not answer.
func Find(ctx context.Context) (*Engine, error) {
	socket := DefaultSocket
	if host := os.Getenv("DOCKER_HOST"); host != "" {
		path, ok := strings.CutPrefix(host, "unix://")
		if !ok {
			return nil, fmt.Errorf("engine at DOCKER_HOST=%s: only unix:// is supported, because workloads on another machine cannot be attested", host)
		}
		socket = path
	}
	e := Open(socket)
	if err := e.Ping(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

// Ping returns nil if the engine answers within two seconds.
func (e *Engine) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return e.call(ctx, http.MethodGet, "/_ping", nil, nil)
}

// Load loads a docker-archive.
func (e *Engine) Load(ctx context.Context, archive io.Reader) error {
	var out bytes.Buffer
	if err := e.do(ctx, http.MethodPost, "/images/load?quiet=1", "application/x-tar", archive, &out); err != nil {
		return err
	}
	// The engine reports a bad archive inside of a successful answer.
	for d := json.NewDecoder(&out); ; {
		var line struct {
			Error string `json:"error"`
		}
		switch err := d.Decode(&line); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("load image: %w", err)
		case line.Error != "":
			return fmt.Errorf("load image: %s", line.Error)
		}
	}
}

// HasImage says whether the engine has the image with this digest or tag.
func (e *Engine) HasImage(ctx context.Context, ref string) (bool, error) {
	err := e.call(ctx, http.MethodGet, "/images/"+url.PathEscape(ref)+"/json", nil, nil)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// CreateNetwork creates a bridge network of its own for containers.
func (e *Engine) CreateNetwork(ctx context.Context, name string, labels map[string]string) error {
	return e.call(ctx, http.MethodPost, "/networks/create", map[string]any{
		"Name": name, "Driver": "bridge", "CheckDuplicate": true, "Labels": labels,
	}, nil)
}

// RemoveNetworks removes the networks that carry the label.
func (e *Engine) RemoveNetworks(ctx context.Context, label string) error {
	var networks []struct{ ID, Name string }
	if err := e.call(ctx, http.MethodGet, "/networks?filters="+labelFilter(label), nil, &networks); err != nil {
		return err
	}
	for _, n := range networks {
		if err := e.call(ctx, http.MethodDelete, "/networks/"+n.ID, nil, nil); err != nil {
			return fmt.Errorf("remove network %s: %w", n.Name, err)
		}
	}
	return nil
}

// Spec says how a container is made.
type Spec struct {
	Name    string
	Image   string
	Command []string
	Env     []string
	Labels  map[string]string
	// User is "uid:gid"; empty means root.
	User string
	// Network is the name of a network, or "container:" and a container's name
	// whose network the new one shares.
	Network string
	// Mounts are "host path:path inside[:ro]".
	Mounts []string
}

// Run creates a container and starts it. It returns the container's ID, also
// with an error if it was created but did not start.
func (e *Engine) Run(ctx context.Context, s Spec) (string, error) {
	var created struct{ ID string }
	err := e.call(ctx, http.MethodPost, "/containers/create?name="+url.QueryEscape(s.Name), map[string]any{
		"Image": s.Image, "Cmd": s.Command, "Env": s.Env, "Labels": s.Labels, "User": s.User,
		"StopSignal": "SIGTERM",
		"HostConfig": map[string]any{
			"NetworkMode": s.Network, "Binds": s.Mounts, "ReadonlyRootfs": true,
			"CapDrop": []string{"ALL"}, "SecurityOpt": []string{"no-new-privileges"},
			"Ulimits": []map[string]any{{"Name": "nofile", "Soft": 4096, "Hard": 4096}},
		},
	}, &created)
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", s.Name, err)
	}
	if err := e.call(ctx, http.MethodPost, "/containers/"+created.ID+"/start", nil, nil); err != nil {
		return created.ID, fmt.Errorf("start container %s: %w", s.Name, err)
	}
	return created.ID, nil
}

// Container is what the engine says of a container.
type Container struct {
	ID      string
	Name    string
	Running bool
	PID     int
	// Address is the container's own address on its network, or "".
	Address string
	Labels  map[string]string
}

// Inspect returns what the engine says of a container, by ID or name.
func (e *Engine) Inspect(ctx context.Context, container string) (*Container, error) {
	var in struct {
		ID    string
		Name  string
		State struct {
			Running bool
			Pid     int
		}
		Config struct {
			Labels map[string]string
		}
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress string }
		}
	}
	if err := e.call(ctx, http.MethodGet, "/containers/"+container+"/json", nil, &in); err != nil {
		return nil, fmt.Errorf("inspect container %s: %w", container, err)
	}
	c := &Container{
		ID: in.ID, Name: strings.TrimPrefix(in.Name, "/"), Running: in.State.Running, PID: in.State.Pid,
		Labels: in.Config.Labels,
	}
	for _, n := range in.NetworkSettings.Networks {
		if n.IPAddress != "" {
			c.Address = n.IPAddress
		}
	}
	return c, nil
}

// List returns the IDs of the containers that carry the label, stopped ones
// included.
func (e *Engine) List(ctx context.Context, label string) ([]string, error) {
	var containers []struct{ ID string }
	if err := e.call(ctx, http.MethodGet, "/containers/json?all=1&filters="+labelFilter(label), nil, &containers); err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(containers))
	for _, c := range containers {
		ids = append(ids, c.ID)
	}
	return ids, nil
}

// StopContainer asks a container's process to end and kills it after grace.
func (e *Engine) StopContainer(ctx context.Context, container string, grace time.Duration) error {
	return e.call(ctx, http.MethodPost, "/containers/"+container+"/stop?t="+strconv.Itoa(int(grace.Seconds())), nil, nil)
}

// StartContainer starts a stopped container again.
func (e *Engine) StartContainer(ctx context.Context, container string) error {
	return e.call(ctx, http.MethodPost, "/containers/"+container+"/start", nil, nil)
}

// KillContainer sends a signal, such as "SIGKILL", to a container's process.
func (e *Engine) KillContainer(ctx context.Context, container, signal string) error {
	return e.call(ctx, http.MethodPost, "/containers/"+container+"/kill?signal="+url.QueryEscape(signal), nil, nil)
}

// Remove kills and removes a container; one that is already gone is no error.
func (e *Engine) Remove(ctx context.Context, container string) error {
	err := e.call(ctx, http.MethodDelete, "/containers/"+container+"?force=1&v=1", nil, nil)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// Logs returns the end of what a container printed.
func (e *Engine) Logs(ctx context.Context, container string, lines int) (string, error) {
	var raw bytes.Buffer
	path := "/containers/" + container + "/logs?stdout=1&stderr=1&tail=" + strconv.Itoa(lines)
	if err := e.do(ctx, http.MethodGet, path, "", nil, &raw); err != nil {
		return "", err
	}
	// Each chunk has a header of 8 bytes: the stream, three zeros, the length.
	var text strings.Builder
	for b := raw.Bytes(); len(b) >= 8; {
		n := int(b[4])<<24 | int(b[5])<<16 | int(b[6])<<8 | int(b[7])
		b = b[8:]
		n = min(n, len(b))
		text.Write(b[:n])
		b = b[n:]
	}
	return text.String(), nil
}

// Sweep removes all containers and networks that carry the label.
func (e *Engine) Sweep(ctx context.Context, label string) error {
	ids, err := e.List(ctx, label)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := e.Remove(ctx, id); err != nil {
			return fmt.Errorf("remove container %s: %w", id, err)
		}
	}
	return e.RemoveNetworks(ctx, label)
}

func labelFilter(label string) string {
	return url.QueryEscape(`{"label":[` + strconv.Quote(label) + `]}`)
}

// call sends in as JSON, if it is not nil, and decodes the answer into out, if
// it is not nil.
func (e *Engine) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	var answer bytes.Buffer
	if err := e.do(ctx, method, path, "application/json", body, &answer); err != nil {
		return err
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer.Bytes(), out)
}

func (e *Engine) do(ctx context.Context, method, path, contentType string, body io.Reader, answer io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, body)
	if err != nil {
		return err
	}
	if body != nil {
		r.Header.Set("Content-Type", contentType)
	}
	res, err := e.client.Do(r)
	if err != nil {
		return fmt.Errorf("engine at %s: %w", e.Socket, err)
	}
	defer func() { _ = res.Body.Close() }()
	switch {
	case res.StatusCode == http.StatusNotModified: // already started, already stopped
		return nil
	case res.StatusCode == http.StatusNotFound:
		return ErrNotFound
	case res.StatusCode >= http.StatusBadRequest:
		text, _ := io.ReadAll(io.LimitReader(res.Body, 4096))
		return fmt.Errorf("engine at %s: %s %s: %s: %s", e.Socket, method, path, res.Status, bytes.TrimSpace(text))
	}
	_, err = io.Copy(answer, res.Body)
	return err
}
