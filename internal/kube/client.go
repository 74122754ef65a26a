// Package kube is the CA's side of the Kubernetes API: a client of one cluster's API
// server, and what is followed there. It answers "what does the cluster itself say".
// It does not know what the CA does with the answers, and it has none of the typed
// clients: whoever asks brings a struct with the few fields that are needed.
package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

const (
	// callTimeout bounds each call but a watch, beside the caller's deadline.
	callTimeout = 15 * time.Second
	// requestsPerSecond and requestBurst bound what this process asks of an API
	// server, which has limits of its own (API Priority and Fairness).
	requestsPerSecond = 100
	requestBurst      = 200
	// maxResponse bounds the answer to a call, which is read into memory.
	maxResponse = 64 << 20
	// applier is who owns the fields that Apply sets.
	applier = "meshid"
)

// Config says which API server to talk to, and as whom.
type Config struct {
	// Name of the cluster, for errors and logs.
	Name string
	// Kubeconfig is the path of a kubeconfig file; empty for the service account of the
	// pod that this process runs in. Files that it names (token, certificate, key, CA)
	// are read again when they change.
	Kubeconfig string
	// Context of the kubeconfig; empty for its current one.
	Context string
	// UserAgent names this program in the API server's audit log.
	UserAgent string
	// Logger gets what the API server warns of; nil for none.
	Logger *slog.Logger
	// Registerer gets the client's metrics; nil for none. Clients of clusters of the same
	// name count together.
	Registerer prometheus.Registerer
}

// Client talks to the API server of one cluster. Its methods may be called
// concurrently. They do not try again: a call that was refused, limited or not answered
// is the caller's decision. Each has a deadline of its own beside that of its context.
//
// Errors are an *Error, of one of the kinds below it.
type Client struct {
	name    string
	rest    *rest.RESTClient
	logger  *slog.Logger
	metrics *metrics
}

// Open reads the configuration. It does not talk to the API server.
func Open(c Config) (*Client, error) {
	config, err := restConfig(c)
	if err != nil {
		return nil, err
	}
	if err := checkServer(config); err != nil {
		return nil, err
	}
	logger := c.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"}) // Status, which errors are
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.AcceptContentTypes, config.ContentType = runtime.ContentTypeJSON, runtime.ContentTypeJSON
	config.QPS, config.Burst = requestsPerSecond, requestBurst
	config.UserAgent = c.UserAgent
	config.WarningHandlerWithContext = warnings{logger.With("cluster", c.Name)}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return bounded{next} })
	client, err := rest.UnversionedRESTClientFor(config)
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(c.Name, c.Registerer)
	if err != nil {
		return nil, err
	}
	return &Client{name: c.Name, rest: client, logger: logger.With("cluster", c.Name), metrics: m}, nil
}

func restConfig(c Config) (*rest.Config, error) {
	if c.Kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, errors.New("this process does not run in a pod of the cluster, whose service account it could use: give it a kubeconfig")
		}
		return config, err
	}
	var err error
	if c.Kubeconfig, err = filepath.Abs(c.Kubeconfig); err != nil { // for who reads the error
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	file, err := clientcmd.LoadFromFile(c.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	if err := clientcmd.ResolveLocalPaths(file); err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", c.Kubeconfig, err)
	}
	if _, ok := file.Contexts[c.Context]; !ok && c.Context != "" {
		return nil, fmt.Errorf("kubeconfig %s has no context %q: write one of %s", c.Kubeconfig, c.Context, strings.Join(slices.Sorted(maps.Keys(file.Contexts)), ", "))
	}
	config, err := clientcmd.NewNonInteractiveClientConfig(*file, c.Context, nil, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", c.Kubeconfig, err)
	}
	return config, nil
}

// checkServer refuses an API server that anybody on the way could stand for.
func checkServer(config *rest.Config) error {
	if config.Insecure {
		return errors.New("the kubeconfig says insecure-skip-tls-verify: anybody on the way could answer for the API server; write certificate-authority instead")
	}
	server, err := url.Parse(config.Host)
	if err != nil {
		return fmt.Errorf("address of the API server: %w", err)
	}
	host := server.Hostname()
	if ip := net.ParseIP(host); server.Scheme == "http" && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("the API server's address is %s, without TLS: write https", server.Redacted())
	}
	return nil
}

// Name is the cluster's, as Config has it.
func (c *Client) Name() string { return c.name }

// Server says which version the API server has, such as v1.37.2, and what time it is
// there, to a second.
func (c *Client) Server(ctx context.Context) (version string, now time.Time, err error) {
	path := Path{Resource: Resource{Plural: "version"}}
	ctx, cancel := context.WithTimeout(c.context(ctx), callTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.rest.Get().AbsPath("version").URL().String(), nil)
	if err != nil {
		return "", time.Time{}, err
	}
	answer, err := c.rest.Client.Do(request)
	if err != nil {
		return "", time.Time{}, c.failed("get", path, err)
	}
	defer answer.Body.Close() //nolint:errcheck // it was read
	var body struct {
		GitVersion string `json:"gitVersion"`
	}
	if answer.StatusCode != http.StatusOK {
		return "", time.Time{}, c.failed("get", path, fmt.Errorf("the answer is %s", answer.Status))
	}
	if err := json.NewDecoder(io.LimitReader(answer.Body, 1<<16)).Decode(&body); err != nil {
		return "", time.Time{}, c.failed("get", path, err)
	}
	now, err = http.ParseTime(answer.Header.Get("Date"))
	if err != nil {
		return "", time.Time{}, c.failed("get", path, fmt.Errorf("its time: %w", err))
	}
	return body.GitVersion, now, nil
}

// Resource is a kind of objects, as the API's paths write it.
type Resource struct {
	// Group is empty for the core group.
	Group   string
	Version string
	// Plural is the kind's name in paths, such as "pods".
	Plural string
}

// Path is where a collection or an object is.
type Path struct {
	Resource
	// Namespace is empty for what has none, and for all namespaces.
	Namespace string
	// Name is empty for the collection.
	Name string
	// Subresource of the object, such as "status".
	Subresource string
}

// String returns the path as errors write it.
func (p Path) String() string {
	kind := p.Plural
	if p.Group != "" {
		kind += "." + p.Group
	}
	parts := []string{kind, p.Namespace, p.Name, p.Subresource}
	return strings.Join(slices.DeleteFunc(parts, func(part string) bool { return part == "" }), " ")
}

func (p Path) segments() []string {
	segments := []string{"api", p.Version}
	if p.Group != "" {
		segments = []string{"apis", p.Group, p.Version}
	}
	if p.Namespace != "" {
		segments = append(segments, "namespaces", p.Namespace)
	}
	segments = append(segments, p.Plural)
	if p.Name != "" {
		segments = append(segments, p.Name)
	}
	if p.Subresource != "" {
		segments = append(segments, p.Subresource)
	}
	return segments
}

// Get reads one object into a pointer to a struct.
func (c *Client) Get(ctx context.Context, p Path, into any) error {
	return c.call(ctx, "get", c.rest.Get(), p, nil, into)
}

// Page is one page of a list.
type Page[T any] struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
		// Continue is where the next page begins; empty on the last.
		Continue string `json:"continue"`
	} `json:"metadata"`
	Items []T `json:"items"`
}

// Selection says what of a collection is wanted. The zero value is everything.
type Selection struct {
	// Labels and Fields are selectors as kubectl writes them.
	Labels, Fields string
	// Limit bounds the objects on a page; 0 for no bound.
	Limit int
	// Continue is that of the page before.
	Continue string
}

// List reads a page of a collection into a pointer to a Page.
func (c *Client) List(ctx context.Context, p Path, s Selection, into any) error {
	r := c.rest.Get()
	for name, value := range map[string]string{"labelSelector": s.Labels, "fieldSelector": s.Fields, "continue": s.Continue} {
		if value != "" {
			r.Param(name, value)
		}
	}
	if s.Limit > 0 {
		r.Param("limit", strconv.Itoa(s.Limit))
	}
	return c.call(ctx, "list", r, p, nil, into)
}

// Create makes an object, whose apiVersion and kind must be set, and reads what was
// made into a pointer, which may be nil. ErrExists if the name is taken.
func (c *Client) Create(ctx context.Context, p Path, object, into any) error {
	return c.call(ctx, "create", c.rest.Post(), p, object, into)
}

// Apply makes an object, or sets those of its fields that are given: server-side apply,
// as "meshid", which takes fields over from others. Fields that were given before and
// are not now are removed.
func (c *Client) Apply(ctx context.Context, p Path, object, into any) error {
	r := c.rest.Patch(types.ApplyPatchType).Param("fieldManager", applier).Param("force", "true")
	return c.call(ctx, "apply", r, p, object, into)
}

// Merge changes the given fields of an object: a JSON merge patch. With
// metadata.resourceVersion in it, ErrConflict if the object has changed since.
func (c *Client) Merge(ctx context.Context, p Path, patch, into any) error {
	return c.call(ctx, "patch", c.rest.Patch(types.MergePatchType), p, patch, into)
}

// Delete deletes an object. With a UID, ErrConflict if the object of that name is
// another one by now.
func (c *Client) Delete(ctx context.Context, p Path, uid string) error {
	options := map[string]any{"apiVersion": "v1", "kind": "DeleteOptions"}
	if uid != "" {
		options["preconditions"] = map[string]string{"uid": uid}
	}
	return c.call(ctx, "delete", c.rest.Delete(), p, options, nil)
}

// call makes one request and decodes its answer.
func (c *Client) call(ctx context.Context, verb string, r *rest.Request, p Path, body, into any) error {
	ctx, cancel := context.WithTimeout(c.context(ctx), callTimeout)
	defer cancel()
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("%s %s: %w", verb, p, err)
		}
		r.Body(encoded)
		if verb != "apply" && verb != "patch" { // whose kind of body says what they mean
			r.SetHeader("Content-Type", runtime.ContentTypeJSON)
		}
	}
	answer := r.MaxRetries(0).AbsPath(p.segments()...).Do(ctx)
	raw, unread := answer.Raw() // its error has the header Retry-After, and not the Status that was sent
	err := answer.Error()
	if err == nil && into != nil {
		err = json.Unmarshal(raw, into)
	}
	err = c.failed(verb, p, err, unread)
	c.metrics.count(err)
	return err
}

// context has what client-go logs go to our logger, and not to stderr.
func (c *Client) context(ctx context.Context) context.Context {
	return klog.NewContext(ctx, logr.FromSlogHandler(details{c.logger.Handler()}))
}

// details logs whatever it is given as a detail: what client-go takes for an error is
// returned to us as well, and is tried again or reported.
type details struct{ slog.Handler }

// Enabled implements slog.Handler.
func (d details) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelDebug && d.Handler.Enabled(ctx, slog.LevelDebug)
}

// Handle implements slog.Handler.
func (d details) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return d.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (d details) WithAttrs(attrs []slog.Attr) slog.Handler {
	return details{d.Handler.WithAttrs(attrs)}
}

// WithGroup implements slog.Handler.
func (d details) WithGroup(name string) slog.Handler { return details{d.Handler.WithGroup(name)} }

// warnings logs what the API server warns of, such as an old version of an API.
type warnings struct{ logger *slog.Logger }

// HandleWarningHeaderWithContext implements rest.WarningHandlerWithContext.
func (w warnings) HandleWarningHeaderWithContext(ctx context.Context, _ int, _, text string) {
	w.logger.WarnContext(ctx, "the api server warns", "reason", text)
}

// bounded bounds the bodies of answers; those of watches have no end.
type bounded struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := b.next.RoundTrip(r)
	if err == nil && !r.URL.Query().Has("watch") {
		response.Body = &boundedBody{response.Body, maxResponse}
	}
	return response, err
}

type boundedBody struct {
	io.ReadCloser
	left int
}

var errLargeAnswer = fmt.Errorf("the answer is larger than %d MiB", maxResponse>>20)

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errLargeAnswer
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}
