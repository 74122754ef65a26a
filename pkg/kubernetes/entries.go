// Package kubernetes keeps in force what is declared in Kubernetes, and in Kubernetes
// what the CA has to say there. It needs no component of its own in the cluster: each CA
// does it, and what one has done the others find done. It does not know how entries are
// judged or where they are stored.
//
//	entries.go       RegistrationEntry objects become registration entries, and their
//	                 status says what became of them
//	configmaps.go    the trust bundle is in a ConfigMap of each namespace that is chosen
//	clusterbundle.go ... and in a ClusterTrustBundle
//	trustbundles.go  TrustBundle objects say where it is to be
//	loop.go          how each of them waits for something to do
//	podcerts.go      PodCertificateRequest objects get their certificates
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/internal/kube"
	"github.com/meshid/meshid/pkg/identity"
	"github.com/meshid/meshid/pkg/server"
)

// The group of our kinds, and its version.
const (
	Group   = "meshid.io"
	Version = "v1alpha1"
)

const (
	// settle is how long changes are collected before they are put into force: a
	// manifest with many objects is one change then.
	settle = 100 * time.Millisecond
	// progress is how often the number of nodes is looked at while it grows.
	progress = time.Second
	// recheck is how often all is compared without a reason, and retry how soon it is
	// tried again after a failure.
	recheck = time.Minute
	retry   = 2 * time.Second
	// maxStatuses bounds the statuses that are written in one go.
	maxStatuses = 200
)

var entryPath = kube.Path{Resource: kube.Resource{Group: Group, Version: Version, Plural: "registrationentries"}}

// Server puts entries into force; *server.Server has it.
type Server interface {
	Declare(ctx context.Context, actor, source string, wanted []*entryv1.Entry) (map[string]*identity.EntryError, error)
	InForce(revision uint64) (nodes, connected int)
	EntryRevision(name string) (revision uint64, ok bool)
}

// EntriesConfig is what NewEntries needs.
type EntriesConfig struct {
	// Client is that of the cluster whose objects are followed. It may list and watch
	// RegistrationEntry objects, and patch their status.
	Client *kube.Client
	Server Server
	Logger *slog.Logger
	// Report is called with what is wrong, and with "" when all is well. It may be nil.
	Report func(problem string)
}

// Entries keeps the RegistrationEntry objects of one cluster in force.
//
// They count for the nodes of that cluster alone: whoever may write there must not name
// workloads elsewhere.
type Entries struct {
	cfg     EntriesConfig
	feed    *kube.Feed
	waker   waker
	objects *kube.Mirror[*registrationEntry]
}

// registrationEntry is an object of the kind RegistrationEntry.
type registrationEntry struct {
	kube.Object
	Spec   entrySpec   `json:"spec"`
	Status entryStatus `json:"status"`
}

type entrySpec struct {
	SpiffeID   string   `json:"spiffeID"`
	Nodes      string   `json:"nodes"`
	Workloads  string   `json:"workloads"`
	TTL        string   `json:"ttl"`
	DNSNames   []string `json:"dnsNames"`
	Hint       string   `json:"hint"`
	AcceptWeak bool     `json:"acceptWeak"`
}

type entryStatus struct {
	ObservedGeneration int64       `json:"observedGeneration"`
	Conditions         []condition `json:"conditions"`
	Revision           int64       `json:"revision"`
	NodesInForce       int         `json:"nodesInForce"`
	NodesConnected     int         `json:"nodesConnected"`
	// Nodes is the same for people, as "411/412".
	Nodes string `json:"nodes"`
}

// condition is one of the usual conditions of an object's status.
type condition struct {
	Type               string `json:"type"`
	Status             string `json:"status"`
	Reason             string `json:"reason"`
	Message            string `json:"message"`
	LastTransitionTime string `json:"lastTransitionTime"`
	ObservedGeneration int64  `json:"observedGeneration"`
}

// Conditions of a RegistrationEntry, and their reasons.
const (
	conditionAccepted = "Accepted"
	conditionInForce  = "InForce"
	reasonAccepted    = "Accepted"
	reasonInvalid     = "Invalid"
	reasonAllNodes    = "AllNodes"
	reasonSomeNodes   = "SomeNodesBehind"
	reasonRejected    = "Rejected"
	reasonEarlier     = "EarlierVersion"
)

// NewEntries returns what Run has to be called on.
func NewEntries(cfg EntriesConfig) *Entries {
	if cfg.Report == nil {
		cfg.Report = func(string) {}
	}
	e := &Entries{cfg: cfg, waker: newWaker()}
	e.objects = kube.NewMirror(func(o *registrationEntry) string { return o.Metadata.Name }, func(a, b *registrationEntry) bool {
		return a.Metadata.SameSpec(&b.Metadata) // of a status that we or another CA have written, nothing follows
	}, e.waker.wake)
	e.feed = kube.Follow(cfg.Client, entryPath, kube.FollowOptions{}, func(o *registrationEntry) *registrationEntry { return o }, kube.Reader[*registrationEntry](e.objects))
	return e
}

// Run keeps them in force until ctx ends.
func (e *Entries) Run(ctx context.Context) error {
	loop(ctx, e.waker, settle, e.reconcile, e.feed)
	return nil
}

// reconcile puts the objects into force and says in each what became of it. It returns
// when to look again.
func (e *Entries) reconcile(ctx context.Context) time.Duration {
	// What is there is not known before all has been read: nothing is taken out of force
	// for want of an answer.
	if s := e.feed.State(); !s.Synced {
		if s.Err != nil {
			e.cfg.Report(unreadable("RegistrationEntry", e.cfg.Client, s.Err))
		}
		return retry
	}
	objects := e.snapshot()
	wanted := make([]*entryv1.Entry, 0, len(objects))
	malformed := make(map[string]string)
	for _, o := range objects {
		entry, problem := e.entry(o)
		if problem != "" {
			malformed[o.Metadata.Name] = problem
		}
		// It is wanted even so: what is in force under its name stays.
		wanted = append(wanted, entry)
	}
	rejected, err := e.cfg.Server.Declare(ctx, "kubernetes:"+e.cfg.Client.Name(), e.cfg.Client.Name(), wanted)
	if err != nil {
		if ctx.Err() == nil {
			e.cfg.Logger.WarnContext(ctx, "entries declared in Kubernetes cannot be put into force", "cluster", e.cfg.Client.Name(), "err", err)
			e.cfg.Report(fmt.Sprintf("the RegistrationEntry objects of cluster %s cannot be put into force: %v", e.cfg.Client.Name(), err))
		}
		return retry
	}
	e.cfg.Report("")
	next, written := recheck, 0
	for _, o := range objects {
		name := e.name(o)
		problem := malformed[o.Metadata.Name]
		if r, ok := rejected[name]; ok && problem == "" {
			problem = r.Error()
		}
		status := e.status(o, problem)
		if status.behind() {
			next = progress
		}
		if status.equal(&o.Status) {
			continue
		}
		if written++; written > maxStatuses {
			return progress
		}
		if err := writeStatus(ctx, e.cfg.Client, entryPath, &o.Object, status); err != nil {
			if ctx.Err() == nil {
				e.cfg.Logger.WarnContext(ctx, "the status of an entry cannot be written", "cluster", e.cfg.Client.Name(), "entry", o.Metadata.Name, "err", err)
			}
			return retry
		}
	}
	return next
}

// unreadable says that objects of one of our kinds cannot be read, and what to do.
func unreadable(kind string, c *kube.Client, err error) string {
	problem := fmt.Sprintf("the %s objects of cluster %s cannot be read: %v", kind, c.Name(), err)
	if errors.Is(err, kube.ErrNotFound) {
		problem += ": the kind is not there: kubectl apply --server-side -f deploy/kubernetes/crds.yaml, or have them not read"
	}
	return problem
}

func (s *entryStatus) equal(o *entryStatus) bool {
	return s.ObservedGeneration == o.ObservedGeneration && s.Revision == o.Revision && s.Nodes == o.Nodes && slices.Equal(s.Conditions, o.Conditions)
}

// behind reports whether some nodes are expected to follow.
func (s *entryStatus) behind() bool {
	return slices.ContainsFunc(s.Conditions, func(c condition) bool { return c.Reason == reasonSomeNodes })
}

// snapshot returns the objects that are not being deleted, by name.
func (e *Entries) snapshot() []*registrationEntry {
	all := slices.SortedFunc(maps.Values(e.objects.All()), func(a, b *registrationEntry) int { return strings.Compare(a.Metadata.Name, b.Metadata.Name) })
	return slices.DeleteFunc(all, func(o *registrationEntry) bool { return o.Metadata.DeletionTimestamp != nil })
}

// name is that of the entry.
func (e *Entries) name(o *registrationEntry) string {
	return server.DeclaredPrefix + e.cfg.Client.Name() + "/" + o.Metadata.Name
}

// entry returns the entry that an object declares, for the nodes of its cluster; problem
// says what only the object can have wrong.
func (e *Entries) entry(o *registrationEntry) (_ *entryv1.Entry, problem string) {
	nodes := "node.k8s.cluster == " + strconv.Quote(e.cfg.Client.Name())
	if o.Spec.Nodes != "" {
		nodes += " && (" + o.Spec.Nodes + ")"
	}
	entry := &entryv1.Entry{
		Name: e.name(o), SpiffeId: o.Spec.SpiffeID, Nodes: nodes, Workloads: o.Spec.Workloads,
		DnsNames: o.Spec.DNSNames, Hint: o.Spec.Hint, AcceptWeak: o.Spec.AcceptWeak,
	}
	// Only what is a rule by itself stays within the parentheses.
	if err := identity.CheckNodes(o.Spec.Nodes); o.Spec.Nodes != "" && err != nil {
		entry.Workloads = "" // it is not put into force
		return entry, err.Error()
	}
	if o.Spec.TTL != "" {
		ttl, err := time.ParseDuration(o.Spec.TTL)
		if err != nil {
			entry.Workloads = ""
			return entry, fmt.Sprintf("ttl: %q is not a duration; write it as 1h or 30m", o.Spec.TTL)
		}
		entry.Ttl = durationpb.New(ttl)
	}
	return entry, ""
}

// status says what became of an object. Once it is in force on all nodes, it stays so
// until it changes: nodes that connect later begin with it.
func (e *Entries) status(o *registrationEntry, problem string) *entryStatus {
	s := &entryStatus{ObservedGeneration: o.Metadata.Generation}
	revision, known := e.cfg.Server.EntryRevision(e.name(o))
	accepted := condition{Type: conditionAccepted, Status: "True", Reason: reasonAccepted}
	force := condition{Type: conditionInForce, Status: "True", Reason: reasonAllNodes}
	if known {
		s.Revision = int64(revision) //nolint:gosec // a counter of changes
		s.NodesInForce, s.NodesConnected = e.cfg.Server.InForce(revision)
		if o.Status.Revision == s.Revision && o.Status.has(force) {
			s.NodesInForce, s.NodesConnected = o.Status.NodesInForce, o.Status.NodesConnected
		}
		s.Nodes = fmt.Sprintf("%d/%d", s.NodesInForce, s.NodesConnected)
	}
	switch {
	case problem != "":
		accepted.Status, accepted.Reason, accepted.Message = "False", reasonInvalid, cut(problem)
		force.Status, force.Reason, force.Message = "False", reasonRejected, "nothing is in force"
		if known {
			force.Reason, force.Message = reasonEarlier, fmt.Sprintf("what was accepted before, in revision %d, is still in force", revision)
		}
	case s.NodesInForce < s.NodesConnected:
		force.Status, force.Reason, force.Message = "False", reasonSomeNodes, "nodes are behind, see: ca entry status"
	default:
	}
	for _, c := range []condition{accepted, force} {
		c.ObservedGeneration = o.Metadata.Generation
		s.Conditions = append(s.Conditions, c.since(o.Status.Conditions))
	}
	return s
}

// since sets when the condition became what it is: now, or when it was so before.
func (c condition) since(before []condition) condition {
	c.LastTransitionTime = time.Now().UTC().Format(time.RFC3339)
	for _, b := range before {
		if b.Type == c.Type && b.Status == c.Status {
			c.LastTransitionTime = b.LastTransitionTime
		}
	}
	return c
}

func (s *entryStatus) has(c condition) bool {
	return slices.ContainsFunc(s.Conditions, func(o condition) bool { return o.Type == c.Type && o.Status == c.Status && o.Reason == c.Reason })
}

// maxMessage is the longest message of a condition.
const maxMessage = 2048

func cut(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return s[:maxMessage] + "…"
}
