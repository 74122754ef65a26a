// Package console is the CA's web console: it answers "what goes on" to people, in
// a browser, and changes nothing. The server makes the pages; a small script renews
// what is seen when the ledger grows. It does not know where anything is stored, how
// it is issued, or how records are found: it asks those who do, through the
// interfaces that it declares.
package console

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"

	"github.com/meshid/meshid/pkg/ledger/search"
)

// Fleet is what the CA says of itself and of its nodes; the server's admin service
// has it.
type Fleet interface {
	GetStatus(ctx context.Context, req *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error)
	ListNodes(ctx context.Context, req *adminv1.ListNodesRequest) (*adminv1.ListNodesResponse, error)
}

// Rules are the registration entries and the authorities that are in force; the
// server's admin service has them.
type Rules interface {
	ListEntries(ctx context.Context, req *adminv1.ListEntriesRequest) (*adminv1.ListEntriesResponse, error)
	ListAuthorities(ctx context.Context, req *adminv1.ListAuthoritiesRequest) (*adminv1.ListAuthoritiesResponse, error)
}

// Authorities knows what chains to a root; the server does.
type Authorities interface {
	// Below returns the id of a root that is named by its id or the SHA-256 of its
	// certificate, or the beginning of one, and the intermediates that chain to it.
	// The error wraps search.ErrNoRoot if there is none.
	Below(ctx context.Context, root string) (id string, intermediates []string, err error)
}

// Records finds the ledger's records.
type Records interface {
	Find(ctx context.Context, q search.Query) ([]search.Found, search.Position, error)
	Record(ctx context.Context, index uint64) (search.Found, error)
}

// Tallies counts decisions.
type Tallies interface {
	Tallies(ctx context.Context, since, until time.Time, step time.Duration) ([]search.Tally, error)
	EntryTallies(ctx context.Context, since time.Time) ([]search.EntryTally, error)
}

// Inventory knows the X.509-SVIDs that are valid and in use.
type Inventory interface {
	Who(ctx context.Context, q search.Holders) ([]search.Found, search.Position, error)
	Identities(ctx context.Context, now time.Time, part, after string, limit int) ([]search.Identity, error)
	Horizon(ctx context.Context, now time.Time, step time.Duration, steps int) (search.Horizon, error)
}

// Index is the ledger's search index.
type Index interface {
	Records
	Tallies
	Inventory
}

// Proof is what the ledger's tree says of one record.
type Proof struct {
	// Size of the newest signed checkpoint, its Root and the log's Origin.
	Size   uint64
	Root   [32]byte
	Origin string
	// Covered: the checkpoint covers the record. Hashes is then the length of the
	// inclusion proof, which was verified just now.
	Covered bool
	Hashes  int
}

// Tree proves that records are in the ledger's tree.
type Tree interface {
	// Prove proves the record at index with these bytes. It is an error if the tree
	// has another record there.
	Prove(index uint64, record []byte) (Proof, error)
	// Newest is the newest checkpoint, with nothing proved by it.
	Newest() Proof
	// Halted is why nothing more is signed, nil if it is.
	Halted() error
}

// Config is what a Console is made of. What has no default is required.
type Config struct {
	// Names by which browsers reach the console, without port; requests for other
	// names are refused, so that no foreign name can be made to point here.
	Names []string
	// Strict has browsers insist on a valid certificate from then on (HSTS).
	Strict bool

	Fleet Fleet
	Rules Rules
	// Authorities knows what chains to a root.
	Authorities Authorities
	// Ledger is where it is recorded who signs in.
	Ledger Ledger
	// Index is nil if there is none: pages then say so.
	Index Index
	Tree  Tree

	// Access says who may look. Without any way in, nobody may.
	Access Access

	// Now is time.Now except in tests.
	Now        func() time.Time
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Limits of requests.
const (
	headerTimeout  = 5 * time.Second
	readTimeout    = 10 * time.Second
	writeTimeout   = 30 * time.Second
	idleTimeout    = time.Minute
	maxHeaderBytes = 16 << 10
	maxBodyBytes   = 8 << 10
	maxURLBytes    = 4 << 10
	maxConns       = 512
	maxRequests    = 64 // at the same time, streams of events aside
	maxStreams     = 64 // of events
	queryTimeout   = 5 * time.Second
	stopTimeout    = 5 * time.Second
)

// Console serves the pages. All methods may be called concurrently.
type Console struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	names    map[string]bool
	pages    *pages
	sessions *expiring[user]
	links    *expiring[string]   // who made each
	seen     *expiring[struct{}] // certificates whose use was recorded
	seeing   sync.Mutex          // held while that is recorded
	tries    *tries
	oidc     *oidcLogin // nil without
	news     *news
	places   chan struct{}
	handler  http.Handler
}

// New returns a console.
func New(cfg Config) (*Console, error) {
	if cfg.Fleet == nil || cfg.Rules == nil || cfg.Tree == nil || cfg.Ledger == nil || cfg.Authorities == nil || len(cfg.Names) == 0 || cfg.Logger == nil || cfg.Registerer == nil {
		return nil, errors.New("make console: fleet, rules, authorities, tree, ledger, names, logger and registerer are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Console{
		cfg: cfg, log: cfg.Logger, names: make(map[string]bool, len(cfg.Names)),
		sessions: newExpiring[user](maxSessions), links: newExpiring[string](maxLinks), seen: newExpiring[struct{}](maxSessions),
		tries: newTries(), news: newNews(),
		places: make(chan struct{}, maxRequests),
	}
	for _, n := range cfg.Names {
		c.names[canonical(n)] = true
	}
	var err error
	if c.pages, err = newPages(cfg.Now); err != nil {
		return nil, err
	}
	if cfg.Access.OIDC != nil {
		if c.oidc, err = newOIDCLogin(*cfg.Access.OIDC); err != nil {
			return nil, err
		}
	}
	if c.metrics, err = newMetrics(cfg.Registerer, c); err != nil {
		return nil, err
	}
	c.handler = c.guard(c.routes())
	return c, nil
}

// Changed says that there is something new to see. It never blocks.
func (c *Console) Changed() { c.news.tell() }

// ServeHTTP implements http.Handler.
func (c *Console) ServeHTTP(w http.ResponseWriter, r *http.Request) { c.handler.ServeHTTP(w, r) }

// Serve serves l with TLS until ctx ends.
func (c *Console) Serve(ctx context.Context, l net.Listener, t *tls.Config) error {
	server := &http.Server{
		Handler: c, TLSConfig: t, ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeaderBytes,
		ErrorLog: slog.NewLogLogger(c.log.Handler(), slog.LevelDebug), // handshakes that strangers fail
		// The context of ctx ends the streams of events.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		err := server.ServeTLS(netutil.LimitListener(l, maxConns), "", "")
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	})
	group.Go(func() error {
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if err := server.Shutdown(stop); err != nil {
			return server.Close()
		}
		return nil
	})
	return group.Wait()
}

// routes are all that there is. What needs no login is on the left.
func (c *Console) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) { redirect(w, r, prefix+"/") })
	mux.HandleFunc("GET "+prefix, func(w http.ResponseWriter, r *http.Request) { redirect(w, r, prefix+"/") })
	mux.HandleFunc("GET "+prefix+"/assets/{name}", c.asset)
	mux.HandleFunc("GET "+loginPath, c.showLogin)
	mux.HandleFunc("POST "+loginPath+"/link", c.loginByLink)
	mux.HandleFunc("GET "+loginPath+"/oidc", c.loginByOIDC)
	mux.HandleFunc("GET "+loginPath+"/callback", c.callbackOIDC)
	mux.HandleFunc("POST "+prefix+"/logout", c.logout)

	mux.Handle("GET "+prefix+"/events", c.known(c.events))
	for path, page := range map[string]func(*http.Request, *view) error{
		"/{$}":             c.overview,
		"/nodes":           c.nodes,
		"/identities":      c.identities,
		"/issuance":        c.issuance,
		"/authorities":     c.authorities,
		"/entries":         c.entries,
		"/holders":         c.holders,
		"/ledger":          c.ledger,
		"/ledger/{record}": c.record,
	} {
		mux.Handle("GET "+prefix+path, c.known(c.page(page)))
	}
	mux.Handle("/", c.known(c.page(func(*http.Request, *view) error { return errNotFound })))
	return mux
}
