package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// patience bounds how long a test waits for what comes for sure.
const patience = time.Minute

// answers are what a server sends, one request after the other; the last one is for all
// that follow. What was asked for is in asked.
type answers struct {
	mu    sync.Mutex
	asked []url.Values
	steps []func(w http.ResponseWriter, r *http.Request)
}

func (a *answers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.asked = append(a.asked, r.URL.Query())
	step := a.steps[0]
	if len(a.steps) > 1 {
		a.steps = a.steps[1:]
	}
	a.mu.Unlock()
	step(w, r)
}

// events answers a watch with these, and then leaves it open if hold.
func answerEvents(hold bool, lines ...string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.(http.Flusher).Flush() //nolint:forcetypeassert // it is one
		for _, line := range lines {
			fmt.Fprintln(w, line)
			w.(http.Flusher).Flush() //nolint:forcetypeassert // it is one
		}
		if hold {
			<-r.Context().Done()
		}
	}
}

func answerStatus(code int, reason string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q,"message":"so it is"}`, code, reason)
	}
}

func answerPage(text string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, text)
	}
}

// thing is what the tests follow.
type thing struct {
	Object
	Spec struct {
		Color string `json:"color"`
	} `json:"spec"`
}

func thingJSON(name string, version int, color string) string {
	return fmt.Sprintf(`{"kind":"Thing","apiVersion":"g.io/v1","metadata":{"name":%q,"namespace":"n","uid":%q,"resourceVersion":"%d","managedFields":[{"fieldsV1":{"f:spec":{}}}]},"spec":{"color":%q}}`, name, name, version, color)
}

func eventJSON(kind, object string) string {
	return fmt.Sprintf(`{"type":%q,"object":%s}`, kind, object)
}

const initialEnd = `{"type":"BOOKMARK","object":{"kind":"Thing","apiVersion":"g.io/v1","metadata":{"resourceVersion":"9","annotations":{"k8s.io/initial-events-end":"true"}}}}`

// log is a Reader that writes down what it is told.
type log struct {
	lines chan string
}

func (l log) Replace(all []string) {
	slices.Sort(all)
	l.lines <- "replace " + strings.Join(all, " ")
}
func (l log) Set(s string)    { l.lines <- "set " + s }
func (l log) Delete(s string) { l.lines <- "delete " + s }

func (l log) want(t *testing.T, lines ...string) {
	t.Helper()
	for _, want := range lines {
		select {
		case got := <-l.lines:
			if got != want {
				t.Fatalf("told %q, want %q", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("not told %q", want)
		}
	}
}

// follow runs a feed of things until the test ends.
func follow(t *testing.T, o FollowOptions, steps ...func(http.ResponseWriter, *http.Request)) (*Feed, log, *answers) {
	t.Helper()
	return followUntilSilent(t, silence, o, steps...)
}

func followUntilSilent(t *testing.T, silence time.Duration, o FollowOptions, steps ...func(http.ResponseWriter, *http.Request)) (*Feed, log, *answers) {
	t.Helper()
	a := &answers{steps: steps}
	c := open(t, a.ServeHTTP)
	l := log{make(chan string, 100)}
	f := Follow(c, Path{Resource: Resource{Group: "g.io", Version: "v1", Plural: "things"}}, o,
		func(o *thing) string { return o.Metadata.Name + "=" + o.Spec.Color }, Reader[string](l))
	f.silence = silence
	var done sync.WaitGroup
	done.Go(func() { f.Run(t.Context()) })
	t.Cleanup(done.Wait)
	return f, l, a
}

// await waits until a feed is as it should be.
func await(t *testing.T, f *Feed, ok func(FeedState) bool) FeedState {
	t.Helper()
	end, look := time.After(patience), time.NewTicker(time.Millisecond)
	defer look.Stop()
	for !ok(f.State()) {
		select {
		case <-look.C:
		case <-end:
			t.Fatalf("the feed stays %+v", f.State())
		}
	}
	return f.State()
}

func current(s FeedState) bool { return s.Current }

// The list comes as a stream; a watch that the server ends goes on where it ended.
func TestFeedStreams(t *testing.T) {
	f, l, a := follow(t, FollowOptions{Labels: "a=b", Fields: "c=d", MetadataOnly: true},
		answerEvents(false, eventJSON("ADDED", thingJSON("one", 3, "red")), eventJSON("ADDED", thingJSON("two", 2, "blue")), initialEnd,
			eventJSON("MODIFIED", thingJSON("one", 10, "green")),
			`{"type":"BOOKMARK","object":{"kind":"Thing","apiVersion":"g.io/v1","metadata":{"resourceVersion":"20"}}}`),
		answerEvents(true, eventJSON("DELETED", thingJSON("two", 21, "blue"))),
	)
	l.want(t, "replace one=red two=blue", "set one=green", "delete two=blue")
	s := await(t, f, current)
	if _, why := s.Behind(time.Now()); why != nil || !s.Synced {
		t.Errorf("behind: %v, %+v", why, s)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, q := range a.asked {
		q.Del("timeoutSeconds")
	}
	if diff := cmp.Diff([]url.Values{
		{"watch": {"true"}, "allowWatchBookmarks": {"true"}, "sendInitialEvents": {"true"}, "resourceVersionMatch": {"NotOlderThan"}, "labelSelector": {"a=b"}, "fieldSelector": {"c=d"}},
		{"watch": {"true"}, "allowWatchBookmarks": {"true"}, "resourceVersion": {"20"}, "labelSelector": {"a=b"}, "fieldSelector": {"c=d"}},
	}, a.asked); diff != "" {
		t.Errorf("asked for (-want +got):\n%s", diff)
	}
}

// An older server is asked for pages.
func TestFeedPages(t *testing.T) {
	f, l, a := follow(t, FollowOptions{},
		answerStatus(422, "Invalid"),
		answerPage(`{"metadata":{"resourceVersion":"7","continue":"x"},"items":[`+thingJSON("one", 3, "red")+`]}`),
		answerPage(`{"metadata":{"resourceVersion":"7"},"items":[`+thingJSON("two", 4, "blue")+`]}`),
		answerEvents(true),
	)
	l.want(t, "replace one=red two=blue")
	await(t, f, current)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.asked[1].Get("limit") == "" || a.asked[1].Has("resourceVersion") || a.asked[2].Get("continue") != "x" || a.asked[3].Get("resourceVersion") != "7" {
		t.Errorf("asked for %v", a.asked)
	}
}

// Objects that are too large for a page come in smaller ones.
func TestFeedLargePages(t *testing.T) {
	large := strings.Repeat("x", 3<<20)
	var all strings.Builder
	for i := range 40 {
		fmt.Fprintf(&all, ",%s", thingJSON(fmt.Sprint("t", i), i+1, large))
	}
	f, l, a := follow(t, FollowOptions{},
		answerStatus(422, "Invalid"),
		answerPage(`{"metadata":{"resourceVersion":"7"},"items":[`+all.String()[1:]+`]}`),
		answerPage(`{"metadata":{"resourceVersion":"7","continue":"x"},"items":[`+thingJSON("one", 3, "red")+`]}`),
		answerPage(`{"metadata":{"resourceVersion":"7"},"items":[`+thingJSON("two", 4, "blue")+`]}`),
		answerEvents(true),
	)
	l.want(t, "replace one=red two=blue")
	await(t, f, current)
	a.mu.Lock()
	defer a.mu.Unlock()
	var pages []string
	for _, q := range a.asked[1:4] {
		pages = append(pages, q.Get("limit")+q.Get("continue"))
	}
	if diff := cmp.Diff([]string{"500", "16", "16x"}, pages); diff != "" {
		t.Errorf("pages (-want +got):\n%s", diff)
	}
}

// What the server does not remember is listed again; until then, nothing is taken back.
func TestFeedExpired(t *testing.T) {
	listing := make(chan struct{})
	f, l, _ := follow(t, FollowOptions{},
		answerEvents(false, eventJSON("ADDED", thingJSON("one", 3, "red")), initialEnd,
			`{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","code":410,"reason":"Expired","message":"too old"}}`),
		func(w http.ResponseWriter, r *http.Request) {
			<-listing
			answerEvents(true, eventJSON("ADDED", thingJSON("two", 30, "blue")), initialEnd)(w, r)
		},
	)
	l.want(t, "replace one=red")
	s := await(t, f, func(s FeedState) bool { return !s.Current })
	if _, why := s.Behind(s.Since.Add(time.Minute)); why == nil {
		t.Error("not behind while it lists again")
	}
	select {
	case line := <-l.lines:
		t.Errorf("told %q while nothing is known", line)
	default:
	}
	close(listing)
	l.want(t, "replace two=blue")
	await(t, f, current)
}

// What the server says is wrong is in the state, and is tried again.
func TestFeedErrors(t *testing.T) {
	f, l, _ := follow(t, FollowOptions{},
		answerStatus(403, "Forbidden"), answerStatus(403, "Forbidden"), // as a stream, and in pages
		answerStatus(404, "NotFound"), answerStatus(404, "NotFound"),
		answerEvents(false, `{"type":"ADDED","object":`),
		answerEvents(false, eventJSON("ADDED", `"no object"`)),
		answerEvents(true, initialEnd),
	)
	await(t, f, func(s FeedState) bool { return errors.Is(s.Err, ErrDenied) })
	await(t, f, func(s FeedState) bool { return errors.Is(s.Err, ErrNotFound) })
	if _, why := f.State().Behind(time.Now()); why == nil {
		t.Error("a feed that has read nothing is not behind")
	}
	l.want(t, "replace ")
	if s := await(t, f, current); s.Err != nil {
		t.Errorf("an error has stayed: %v", s.Err)
	}
}

// An event without end does not fill the memory.
func TestFeedEventIsBounded(t *testing.T) {
	f, l, _ := follow(t, FollowOptions{},
		func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"type":"ADDED","object":{"metadata":{"name":"`)
			for r.Context().Err() == nil {
				if _, err := fmt.Fprint(w, strings.Repeat("a", 1<<20)); err != nil {
					return
				}
			}
		},
		answerStatus(500, "InternalError"), answerEvents(true, initialEnd),
	)
	l.want(t, "replace ")
	await(t, f, current)
}

// A server that hangs is not waited for without end, and neither is one that says
// nothing any more: each watch goes on where the one before fell silent.
func TestFeedSilence(t *testing.T) {
	var hung atomic.Bool
	silent := func(w http.ResponseWriter, r *http.Request) {
		switch q := r.URL.Query(); {
		case !q.Has("watch"):
			answerStatus(500, "InternalError")(w, r)
		case q.Has("sendInitialEvents") && !hung.Swap(true):
			<-r.Context().Done()
		case q.Has("sendInitialEvents"):
			answerEvents(true, eventJSON("ADDED", thingJSON("one", 3, "red")), initialEnd)(w, r)
		case q.Get("resourceVersion") == "9":
			answerEvents(true, eventJSON("MODIFIED", thingJSON("one", 11, "blue")))(w, r)
		case q.Get("resourceVersion") == "11":
			answerEvents(true, eventJSON("MODIFIED", thingJSON("one", 12, "green")))(w, r)
		default:
			answerEvents(true)(w, r)
		}
	}
	// Longer than what the reflector takes for a watch that is no good.
	f, l, _ := followUntilSilent(t, 1200*time.Millisecond, FollowOptions{}, silent)
	l.want(t, "replace one=red", "set one=blue", "set one=green")
	await(t, f, func(s FeedState) bool { return errors.Is(s.Err, errSilent) })
}

func TestFeedStateBehind(t *testing.T) {
	now := time.Now()
	for name, test := range map[string]struct {
		state FeedState
		since time.Time
		why   string
	}{
		"current":          {FeedState{Synced: true, Current: true, Since: now.Add(-time.Hour), Heard: now.Add(-time.Minute)}, time.Time{}, ""},
		"silent":           {FeedState{Synced: true, Current: true, Since: now.Add(-time.Hour), Heard: now.Add(-4 * time.Minute)}, now.Add(-4 * time.Minute), "has said nothing"},
		"opened again":     {FeedState{Synced: true, Since: now.Add(-time.Second)}, time.Time{}, ""},
		"ended":            {FeedState{Synced: true, Since: now.Add(-time.Minute)}, now.Add(-time.Minute), "the watch has ended"},
		"refused":          {FeedState{Synced: true, Since: now.Add(-time.Minute), Err: ErrDenied}, now.Add(-time.Minute), "denied"},
		"not read":         {FeedState{Since: now}, now, "not read yet"},
		"not read refused": {FeedState{Since: now, Err: ErrDenied}, now, "denied"},
	} {
		since, why := test.state.Behind(now)
		if !since.Equal(test.since) || (why == nil) != (test.why == "") || why != nil && !strings.Contains(why.Error(), test.why) {
			t.Errorf("%s: %v, %v", name, since, why)
		}
	}
}

// A watch that has ended says nothing about the one that is open by now.
func TestFeedLateEnd(t *testing.T) {
	f := &Feed{}
	first := f.opened(true)
	f.replaced()
	second := f.opened(false)
	f.closed(first, errors.New("late"))
	if s := f.State(); !s.Current || s.Err != nil {
		t.Errorf("the state is %+v", s)
	}
	f.closed(second, nil)
	if f.State().Current {
		t.Error("current without a watch")
	}
}

func FuzzEvent(f *testing.F) {
	f.Add([]byte(eventJSON("ADDED", thingJSON("one", 3, "red"))))
	f.Add([]byte(initialEnd))
	f.Add([]byte(`{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","code":410}}`))
	f.Add([]byte(`{"type":"ADDED","object":{"metadata":{"deletionTimestamp":"x","ownerReferences":[{"controller":true}]},"spec":{"containers":[{}]}}}`))
	f.Fuzz(func(_ *testing.T, text []byte) {
		var got event[podObject, *podObject]
		if json.Unmarshal(text, &got) == nil {
			newPod(&got.Object.value)
		}
	})
}
