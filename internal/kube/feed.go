package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
)

// How a collection is followed: client-go's reflector lists it (as a stream of events
// where the server can, else in pages), watches it from there, resumes a watch that
// ended where it ended, and lists again what the server does not remember. Each object
// is reduced to what its reader keeps at the moment it is decoded, so that neither a
// list nor a store ever holds a whole one.

const (
	// listPage bounds a page of a list, and smallPage those of one that is too large for
	// that: so many of the largest objects that the API takes (3 MiB) fit into an answer.
	// Else whoever may create some dozens of them could have the rest not be heard of.
	listPage, smallPage = 500, 16
	// listTimeout bounds a page's way here.
	listTimeout = time.Minute
	// maxEvent bounds the bytes of one event. An object of the API has at most 1.5 MiB.
	maxEvent = 16 << 20
	// reopen is how long a watch may be gone, as it is now and then, before a feed counts
	// as behind.
	reopen = 5 * time.Second
	// silence is how long a watch may say nothing, before it is opened again. A server
	// tells every minute how far it is (a bookmark), if nothing changes.
	silence = 3 * time.Minute
)

// ErrReading says that a collection is being read for the first time.
var ErrReading = errors.New("not read yet")

var errSilent = fmt.Errorf("the API server has said nothing for %v", silence)

// Reader is told what is in a collection, one call at a time, in the API's order.
// Nothing that could not be heard of is ever reported as gone.
type Reader[V any] interface {
	// Replace is called with all that there is: at first, and after more was missed than
	// the server remembers.
	Replace(all []V)
	// Set is called with what was added or changed.
	Set(V)
	// Delete is called with the last state of what was deleted.
	Delete(V)
}

// Feed follows a collection. Its methods may be called concurrently.
type Feed struct {
	run     func(ctx context.Context)
	silence time.Duration // a constant but for tests

	mu    sync.Mutex // guards what follows
	state FeedState
	// streams counts the watches that were opened; the last one may be open still, and
	// caught up: all that was before it has been read.
	streams      int
	open, caught bool
}

// FeedState says how far a feed is.
type FeedState struct {
	// Synced: the whole collection has been read once.
	Synced bool
	// Current: a watch is open, and all that was before it has been read.
	Current bool
	// Since is when Current became what it is.
	Since time.Time
	// Heard is when the server last said something, be it that nothing has changed.
	Heard time.Time
	// Err is why the watch is not open, if that is known.
	Err error
}

// Behind says since when what is known may be old, and why; nil if it is not.
func (s FeedState) Behind(now time.Time) (since time.Time, why error) {
	switch {
	case s.Current && now.Sub(s.Heard) > silence+reopen:
		return s.Heard, errSilent
	case s.Current, s.Synced && now.Sub(s.Since) <= reopen:
		return time.Time{}, nil
	case s.Err != nil:
		return s.Since, s.Err
	case !s.Synced:
		return s.Since, ErrReading
	default:
		return s.Since, errors.New("the watch has ended")
	}
}

// State returns how far the feed is.
func (f *Feed) State() FeedState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state
}

// Run follows until ctx ends. It tries again for as long as the server cannot be
// reached, refuses, or does not have the resource; State says so.
func (f *Feed) Run(ctx context.Context) { f.run(ctx) }

// settle follows from what was changed. The caller holds the lock.
func (f *Feed) settle() {
	if current := f.open && f.caught; current != f.state.Current {
		f.state.Current, f.state.Since = current, time.Now()
	}
	if f.state.Current {
		f.state.Err = nil
	}
}

// opened is called when a watch begins, and returns which one it is. initial says that
// it begins with a list, of which replaced is called at the end.
func (f *Feed) opened(initial bool) (stream int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.streams++
	f.open, f.caught, f.state.Heard = true, !initial, time.Now()
	f.settle()
	return f.streams
}

// heard is called with each event.
func (f *Feed) heard() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state.Heard = time.Now()
}

// replaced is called when a list was read.
func (f *Feed) replaced() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state.Synced, f.caught = true, true
	f.settle()
}

// closed is called when a watch has ended, as the server had said if err is nil.
func (f *Feed) closed(stream int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if stream != f.streams {
		return // the next one is open already
	}
	f.open, f.state.Err = false, err
	f.settle()
}

// failed is called when the server did not answer with a list or a watch.
func (f *Feed) failed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open, f.state.Err = false, err
	f.settle()
}

// FollowOptions say what of a collection is followed, and how. The zero value is
// everything.
type FollowOptions struct {
	// Labels and Fields are selectors as kubectl writes them.
	Labels, Fields string
	// MetadataOnly asks the server to leave out all but the metadata.
	MetadataOnly bool
}

// Follow returns a feed that tells reader of a collection. Each object is decoded into
// a T, of which keep makes what is kept.
func Follow[T any, P object[T], V any](c *Client, p Path, o FollowOptions, keep func(P) V, reader Reader[V]) *Feed {
	f := &Feed{silence: silence, state: FeedState{Since: time.Now()}}
	source := &source[T, P, V]{client: c, path: p, options: o, keep: keep, feed: f}
	f.run = func(ctx context.Context) {
		// The reflector's own back-off of up to a minute is for clusters full of them.
		r := cache.NewReflectorWithOptions(source, nil, store[V]{reader, f}, cache.ReflectorOptions{
			Name: p.String(), TypeDescription: p.String(), Clock: stopping{done: ctx},
			Backoff: &wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Steps: 20, Cap: 10 * time.Second, Jitter: 1},
		})
		r.WatchListPageSize = listPage
		r.RunWithContext(c.context(ctx))
	}
	return f
}

// source is where a reflector gets its list and its watch from.
type source[T any, P object[T], V any] struct {
	client  *Client
	path    Path
	options FollowOptions
	keep    func(P) V
	feed    *Feed
	small   bool // the list that is being read has smallPages; owned by the reflector
}

// item is an object as it comes out of the decoder.
type item[V any] struct {
	metav1.ObjectMeta
	value V
}

// GetObjectKind implements runtime.Object.
func (*item[V]) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject implements runtime.Object. What is kept is not changed any more.
func (i *item[V]) DeepCopyObject() runtime.Object {
	c := *i
	return &c
}

// items is a page of a list.
type items[V any] struct {
	metav1.ListMeta
	Items []item[V]
}

// GetObjectKind implements runtime.Object.
func (*items[V]) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject implements runtime.Object.
func (l *items[V]) DeepCopyObject() runtime.Object {
	c := *l
	return &c
}

func (s *source[T, P, V]) item(o P) item[V] {
	m := o.object().Metadata
	kept := item[V]{ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, ResourceVersion: m.ResourceVersion}}
	if m.Annotations[metav1.InitialEventsAnnotationKey] != "" {
		kept.Annotations = m.Annotations
	}
	kept.value = s.keep(o)
	return kept
}

func (s *source[T, P, V]) request(o metav1.ListOptions, kind string) *rest.Request {
	r := s.client.rest.Get().MaxRetries(0).AbsPath(s.path.segments()...)
	param := func(name, value string) {
		if value != "" {
			r.Param(name, value)
		}
	}
	param("labelSelector", s.options.Labels)
	param("fieldSelector", s.options.Fields)
	param("resourceVersion", o.ResourceVersion)
	param("resourceVersionMatch", string(o.ResourceVersionMatch))
	param("continue", o.Continue)
	if o.Limit > 0 {
		param("limit", strconv.FormatInt(o.Limit, 10))
	}
	if s.options.MetadataOnly {
		r.SetHeader("Accept", "application/json;as="+kind+";g=meta.k8s.io;v=v1")
	}
	return r
}

// List implements cache.ListerWatcher, as ListWithContext.
func (s *source[T, P, V]) List(o metav1.ListOptions) (runtime.Object, error) {
	return s.ListWithContext(context.Background(), o)
}

// ListWithContext reads a page of the list.
func (s *source[T, P, V]) ListWithContext(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	// The reflector would be content with what a server remembers, which may be old, and
	// is not sent in pages.
	o.ResourceVersion = ""
	s.small = s.small && o.Continue != ""
	page, err := s.page(ctx, o)
	if errors.Is(err, errLargeAnswer) {
		s.small = true
		page, err = s.page(ctx, o)
	}
	if err != nil {
		s.feed.failed(s.client.failed("list", s.path, err))
		return nil, err
	}
	list := &items[V]{Items: make([]item[V], len(page.Items))}
	list.ResourceVersion, list.Continue = page.Metadata.ResourceVersion, page.Metadata.Continue
	for i := range page.Items {
		list.Items[i] = s.item(&page.Items[i])
	}
	return list, nil
}

func (s *source[T, P, V]) page(ctx context.Context, o metav1.ListOptions) (page Page[T], err error) {
	if s.small {
		o.Limit = smallPage
	}
	answer := s.request(o, "PartialObjectMetadataList").Do(ctx)
	raw, _ := answer.Raw()
	if err = answer.Error(); err == nil {
		err = json.Unmarshal(raw, &page)
	}
	return page, err
}

// Watch implements cache.ListerWatcher, as WatchWithContext.
func (s *source[T, P, V]) Watch(o metav1.ListOptions) (watch.Interface, error) {
	return s.WatchWithContext(context.Background(), o)
}

// WatchWithContext opens a watch.
func (s *source[T, P, V]) WatchWithContext(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	r := s.request(o, "PartialObjectMetadata").Param("watch", "true")
	if o.AllowWatchBookmarks {
		r.Param("allowWatchBookmarks", "true")
	}
	initial := o.SendInitialEvents != nil && *o.SendInitialEvents
	if initial {
		r.Param("sendInitialEvents", "true")
	}
	if o.TimeoutSeconds != nil {
		r.Param("timeoutSeconds", strconv.FormatInt(*o.TimeoutSeconds, 10))
	}
	stream, cancel := context.WithCancelCause(ctx)
	idle := time.AfterFunc(s.feed.silence, func() { cancel(errSilent) })
	body, err := r.Stream(stream)
	if err != nil {
		idle.Stop()
		err = cmp.Or(context.Cause(stream), err)
		cancel(nil)
		s.feed.failed(s.client.failed("watch", s.path, err))
		return nil, err
	}
	bounded := &eventReader{ReadCloser: body}
	return watch.NewStreamWatcherWithLogger(klog.FromContext(ctx), &events[T, P, V]{
		source: s, stream: s.feed.opened(initial), body: bounded, ctx: stream, cancel: cancel, idle: idle, decoder: json.NewDecoder(bounded),
	}, apierrors.NewClientErrorReporter(http.StatusInternalServerError, "watch", "ClientWatchDecoding")), nil
}

// events decodes the events of a watch.
type events[T any, P object[T], V any] struct {
	source  *source[T, P, V]
	stream  int
	body    *eventReader
	ctx     context.Context //nolint:containedctx // says why the watch was given up
	cancel  context.CancelCauseFunc
	idle    *time.Timer // cancels
	decoder *json.Decoder
}

// eventReader reads the body of a watch, and bounds each event.
type eventReader struct {
	io.ReadCloser
	read int // bytes since the last event
	err  error
}

var errLarge = fmt.Errorf("an event is larger than %d MiB", maxEvent>>20)

// Read implements io.Reader.
func (r *eventReader) Read(p []byte) (int, error) {
	if r.read > maxEvent {
		return 0, errLarge
	}
	n, err := r.ReadCloser.Read(p)
	r.read += n
	r.err = err
	return n, err
}

// event is one event; its object is a Status if the server says what is wrong.
type event[T any, P object[T]] struct {
	Type   watch.EventType   `json:"type"`
	Object eventObject[T, P] `json:"object"`
}

type eventObject[T any, P object[T]] struct {
	value  T
	status *metav1.Status
}

// UnmarshalJSON implements json.Unmarshaler.
func (o *eventObject[T, P]) UnmarshalJSON(text []byte) error {
	if err := json.Unmarshal(text, &o.value); err != nil {
		return err
	}
	if got := P(&o.value).object(); got.Kind == "Status" && got.APIVersion == "v1" {
		o.status = new(metav1.Status)
		return json.Unmarshal(text, o.status)
	}
	return nil
}

// Decode implements watch.Decoder.
func (e *events[T, P, V]) Decode() (watch.EventType, runtime.Object, error) {
	e.body.read = 0
	var got event[T, P]
	err := e.decoder.Decode(&got)
	switch {
	case err != nil && e.body.err != nil:
		// Whatever ended the watch, it may go on from here.
		e.ended(cmp.Or(context.Cause(e.ctx), e.body.err))
		return "", nil, io.EOF
	case err != nil:
		e.ended(err)
		return "", nil, err
	case got.Object.status != nil:
		e.ended(apierrors.FromObject(got.Object.status))
		return got.Type, got.Object.status, nil
	}
	e.idle.Reset(e.source.feed.silence)
	e.source.feed.heard()
	kept := e.source.item(&got.Object.value)
	return got.Type, &kept, nil
}

// ended reports the end of the watch; an end without an error is one that the server
// had announced.
func (e *events[T, P, V]) ended(err error) {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	e.source.feed.closed(e.stream, e.source.client.failed("watch", e.source.path, err))
}

// Close implements watch.Decoder.
func (e *events[T, P, V]) Close() {
	e.idle.Stop()
	e.cancel(nil)
	_ = e.body.Close() // it was only read from
}

// store tells a Reader what a reflector would store.
type store[V any] struct {
	reader Reader[V]
	feed   *Feed
}

func (s store[V]) Add(o any) error    { s.reader.Set(o.(*item[V]).value); return nil } //nolint:forcetypeassert // source makes nothing else
func (s store[V]) Update(o any) error { return s.Add(o) }
func (s store[V]) Delete(o any) error { s.reader.Delete(o.(*item[V]).value); return nil } //nolint:forcetypeassert // as above
func (s store[V]) Resync() error      { return nil }
func (s store[V]) Replace(list []any, _ string) error {
	all := make([]V, len(list))
	for i, o := range list {
		all[i] = o.(*item[V]).value //nolint:forcetypeassert // as above
	}
	s.reader.Replace(all)
	s.feed.replaced()
	return nil
}

// stopping is the real time, but for waits that end with a context: a reflector sleeps
// between attempts without looking at its own.
type stopping struct {
	clock.RealClock
	done context.Context //nolint:containedctx // it is what the reflector's clock is for
}

// After implements clock.Clock.
func (s stopping) After(d time.Duration) <-chan time.Time {
	fired := make(chan time.Time, 1)
	ctx, cancel := context.WithTimeout(s.done, d)
	context.AfterFunc(ctx, func() {
		cancel()
		fired <- time.Now()
	})
	return fired
}
