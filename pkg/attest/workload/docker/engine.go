package docker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/meshid/meshid/pkg/attest/workload/container"
)

const (
	// callTimeout bounds each call but the event stream, from connecting to the
	// last byte. An engine that hangs costs this much, and then an error.
	callTimeout = 2 * time.Second
	// maxAnswer bounds an answer, in bytes; of an inspected container's some ten
	// thousand are usual.
	maxAnswer = 8 << 20
	// maxEvent bounds one event, in bytes: it repeats the container's labels.
	maxEvent = 1 << 20
	// maxLabels bounds the labels of a container or image, keys and values
	// together in bytes, and maxLabelCount their number. A container with more
	// is refused, never attested with fewer labels than it has.
	maxLabels     = 32 << 10
	maxLabelCount = 1024
	// maxImages bounds the images whose labels are remembered.
	maxImages = 512
)

// errUnreachable says that the engine did not answer, or not sensibly. It may be
// asked again.
var errUnreachable = errors.New("the docker engine does not answer, try again")

// engine is a client of the Docker engine's API. Paths have no version: the
// engine then answers as its newest, and what is read of the answers has been
// there in all.
type engine struct {
	client  *http.Client
	metrics *metrics
	timeout time.Duration

	mu sync.Mutex // guards images
	// images are the labels of images by id. An id is the hash of its image, so
	// they never change.
	images map[string]map[string]string
}

func newEngine(socket string, m *metrics) *engine {
	var d net.Dialer
	return &engine{
		client: &http.Client{
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return d.DialContext(ctx, "unix", socket)
				},
				DisableCompression:    true,
				MaxIdleConns:          8,
				MaxIdleConnsPerHost:   8,
				IdleConnTimeout:       time.Minute,
				ResponseHeaderTimeout: callTimeout,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		metrics: m,
		timeout: callTimeout,
		images:  make(map[string]map[string]string),
	}
}

func (e *engine) close() { e.client.CloseIdleConnections() }

// inspected is what is used of an inspected container. It has no place for its
// environment variables.
type inspected struct {
	ID     string `json:"Id"`
	Name   string `json:"Name"`
	Image  string `json:"Image"` // the image's id
	Config struct {
		Image  string            `json:"Image"` // the reference that the container was created from
		Labels map[string]string `json:"Labels"`
	} `json:"Config"`
	State struct {
		Running   bool      `json:"Running"`
		Pid       int       `json:"Pid"`
		StartedAt time.Time `json:"StartedAt"`
	} `json:"State"`
}

// inspectContainer returns a container that runs, or container.ErrNotFound.
func (e *engine) inspectContainer(ctx context.Context, id string) (*inspected, error) {
	if !container.IsID(id) {
		return nil, fmt.Errorf("inspect container %q: not a container id", id)
	}
	var c inspected
	if err := e.call(ctx, callInspectContainer, "/containers/"+id+"/json", nil, &c); err != nil {
		return nil, err
	}
	switch {
	case c.ID != id: // the engine also finds a container by its name
		return nil, container.ErrNotFound
	case !c.State.Running || c.State.Pid <= 0:
		return nil, container.ErrNotFound
	}
	return &c, checkLabels(c.Config.Labels)
}

// imageLabels returns the labels of an image, by its id. The caller does not
// modify them.
func (e *engine) imageLabels(ctx context.Context, id string) (map[string]string, error) {
	e.mu.Lock()
	labels, ok := e.images[id]
	e.mu.Unlock()
	if ok {
		return labels, nil
	}
	labels, err := e.inspectImage(ctx, id)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.images) >= maxImages {
		clear(e.images) // each costs one call more
	}
	e.images[id] = labels
	return labels, nil
}

func (e *engine) inspectImage(ctx context.Context, id string) (map[string]string, error) {
	if id == "" {
		return nil, errors.New("the engine names no image")
	}
	var i struct {
		Config struct {
			Labels map[string]string `json:"Labels"`
		} `json:"Config"`
	}
	err := e.call(ctx, callInspectImage, "/images/"+url.PathEscape(id)+"/json", nil, &i)
	if errors.Is(err, container.ErrNotFound) {
		return nil, fmt.Errorf("image %s was removed, so the image's labels cannot be told from the container's: restart the container from an image that exists", id)
	}
	if err != nil {
		return nil, err
	}
	return i.Config.Labels, checkLabels(i.Config.Labels)
}

// running returns the ids of all running containers.
func (e *engine) running(ctx context.Context) ([]string, error) {
	var list []struct {
		ID string `json:"Id"`
	}
	if err := e.call(ctx, callList, "/containers/json", nil, &list); err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(list))
	for _, c := range list {
		if !container.IsID(c.ID) {
			return nil, fmt.Errorf("list containers: %q is not a container id", c.ID)
		}
		ids = append(ids, c.ID)
	}
	return ids, nil
}

// call makes one bounded call and decodes the answer into out.
func (e *engine) call(ctx context.Context, c call, path string, query url.Values, out any) (err error) {
	defer func() { e.metrics.called(c, err) }()
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	body, err := e.get(ctx, path, query)
	switch {
	case errors.Is(err, container.ErrNotFound):
		return fmt.Errorf("%s: %w", c, err)
	case err != nil:
		return fmt.Errorf("%s: %w: %w", c, errUnreachable, err)
	}
	defer body.Close() //nolint:errcheck // nothing was written
	data, err := io.ReadAll(io.LimitReader(body, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w: %w", c, errUnreachable, err)
	case len(data) > maxAnswer:
		return fmt.Errorf("%s: answer has more than %d bytes", c, maxAnswer)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%s: %w: %w", c, errUnreachable, err)
	}
	return nil
}

// get returns the body of an answer that says OK.
func (e *engine) get(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: "docker", Opaque: "", RawQuery: query.Encode()}
	var err error
	if u.Path, err = url.PathUnescape(path); err != nil {
		return nil, err
	}
	u.RawPath = path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.Body, nil
	case http.StatusNotFound:
		err = container.ErrNotFound
	default:
		err = fmt.Errorf("the engine answers %s", resp.Status)
	}
	// Read to the end, so that the connection can be used again.
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	return nil, errors.Join(err, resp.Body.Close())
}

// change is an event of a container.
type change struct {
	action string
	id     string
}

// The actions that concern the index.
const (
	actionStart   = "start"
	actionRename  = "rename"
	actionDie     = "die"
	actionDestroy = "destroy"
)

// events is an open event stream.
type events struct {
	body io.ReadCloser
	in   *bufio.Reader
}

// events opens the stream of changes, beginning with those since then that the
// engine remembers. The stream ends with ctx.
func (e *engine) events(ctx context.Context, since time.Time) (s *events, err error) {
	defer func() { e.metrics.called(callEvents, err) }()
	filters, err := json.Marshal(map[string][]string{
		"type":  {"container"},
		"event": {actionStart, actionRename, actionDie, actionDestroy},
	})
	if err != nil {
		return nil, err
	}
	body, err := e.get(ctx, "/events", url.Values{
		"since":   {strconv.FormatInt(since.Unix(), 10)},
		"filters": {string(filters)},
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", callEvents, err)
	}
	return &events{body: body, in: bufio.NewReaderSize(body, maxEvent)}, nil
}

// next waits for the next change.
func (s *events) next() (change, error) {
	for {
		line, err := s.in.ReadSlice('\n')
		if err != nil {
			return change{}, fmt.Errorf("read events: %w", err)
		}
		c, ok, err := parseEvent(line)
		if err != nil || ok {
			return c, err
		}
	}
}

func (s *events) close() { _ = s.body.Close() }

// parseEvent reads one event; it is not ok if it does not concern the index.
func parseEvent(line []byte) (c change, ok bool, err error) {
	var e struct {
		Type   string `json:"Type"`
		Action string `json:"Action"`
		Actor  struct {
			ID string `json:"ID"`
		} `json:"Actor"`
	}
	if err := json.Unmarshal(line, &e); err != nil {
		return change{}, false, fmt.Errorf("read events: %w", err)
	}
	if e.Type != "container" || !container.IsID(e.Actor.ID) {
		return change{}, false, nil
	}
	switch e.Action {
	case actionStart, actionRename, actionDie, actionDestroy:
		return change{action: e.Action, id: e.Actor.ID}, true, nil
	default:
		return change{}, false, nil
	}
}

// checkLabels refuses more labels than are attested.
func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabelCount {
		return fmt.Errorf("has %d labels, at most %d are attested: remove some", len(labels), maxLabelCount)
	}
	size := 0
	for k, v := range labels {
		size += len(k) + len(v)
	}
	if size > maxLabels {
		return fmt.Errorf("has labels of %d bytes, at most %d are attested: make them shorter", size, maxLabels)
	}
	return nil
}

// ownLabels returns those of a container's labels that were given when it was
// created. The engine mixes the image's into them; one with another value than
// the image's was given.
func ownLabels(all, image map[string]string) map[string]string {
	own := make(map[string]string)
	for k, v := range all {
		if inherited, ok := image[k]; !ok || inherited != v {
			own[k] = v
		}
	}
	return own
}
