package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	"github.com/meshid/meshid/test/shop/engine"
)

const (
	inboundPort    = 15006
	appPort        = 8080
	firstLocalPort = 9001
	// containerUser is nobody in particular: neither programs nor sidecars
	// need a right on the machine.
	containerUser = "65532:65532"
	containerUID  = 65532

	openTimeout = 2 * time.Minute
)

// Service says how the instances of a service are made.
type Service struct {
	Name string
	// Upstream is the service that it calls, or "".
	Upstream string
	// Clients are the services that may call it.
	Clients []string
	// Args are the arguments of the shop's program.
	Args []string
	// Env is added to the application's environment.
	Env []string
	// Labels are those of the sidecar's container: what makes its identity.
	Labels map[string]string
	// SDS overrides the mesh's own.
	SDS string
	// Statistics says that the program reports what it has counted.
	Statistics bool
}

// Instance is an application and the sidecar beside it.
type Instance struct {
	Service Service
	Name    string
	// Address is where its sidecar listens for others.
	Address string
	// App and Sidecar are the IDs of the containers.
	App, Sidecar string
	Envoy        Envoy

	statsSocket string
	stats       *http.Client
}

func (i *Instance) dial(ctx context.Context) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", i.statsSocket)
	if err != nil {
		return err
	}
	return c.Close()
}

// shop is the state of the services.
type shop struct {
	mu        sync.Mutex // guards what follows
	instances map[string][]*Instance
	departed  Traffic // of instances that are gone
	number    map[string]int
	version   int
}

// The customers' side of the shop, outermost first: who calls whom.
var chain = []Service{
	{Name: "customer", Upstream: "web", Args: []string{"buy"}, Statistics: true},
	{Name: "web", Upstream: "orders", Clients: []string{"customer"}, Args: []string{"serve"}},
	{Name: "orders", Upstream: "stock", Clients: []string{"web"}, Args: []string{"serve"}},
	{Name: "stock", Clients: []string{"orders"}, Args: []string{"serve"}},
}

// Open opens the shop: one instance of each service, and a customer. It returns
// once the first request has gone all the way.
func (m *Mesh) Open(ctx context.Context) error {
	m.Progress("starting the shop: %s, each with its own Envoy", "customer → web → orders → stock")
	if err := m.Engine.CreateNetwork(ctx, m.Run, map[string]string{Label: m.Run}); err != nil {
		return err
	}
	return m.Reopen(ctx)
}

// Reopen starts one instance of each service and a customer in the network that
// Open has made.
func (m *Mesh) Reopen(ctx context.Context) error {
	var expect []string
	for i, s := range chain[1:] {
		expect = append(expect, s.Name+" "+m.ID(chain[i].Name))
	}
	for _, s := range slices.Backward(chain) {
		if s.Statistics {
			s.Env = []string{"SHOP_RATE=" + strconv.Itoa(m.Rate), "SHOP_EXPECT=" + strings.Join(expect, ",")}
		}
		if _, err := m.Add(ctx, s); err != nil {
			return err
		}
	}
	return Await(ctx, "the first request", openTimeout, func(ctx context.Context) error {
		sales, err := m.Sales(ctx)
		if err == nil && sales.Requests == 0 {
			err = errors.New("no request yet")
		}
		return err
	})
}

// Add starts one more instance of a service and tells the others where it is
// once its sidecar has its certificate. A service with no instance yet is new.
func (m *Mesh) Add(ctx context.Context, s Service) (*Instance, error) {
	i, err := m.Launch(ctx, s)
	if err != nil {
		return i, err
	}
	if len(s.Clients) == 0 {
		return i, nil
	}
	if err := m.AwaitReady(ctx, i); err != nil {
		return i, err
	}
	return i, m.publish(ctx, s.Name)
}

// AwaitReady waits until an instance's program answers, and its sidecar has its
// certificate and listens.
func (m *Mesh) AwaitReady(ctx context.Context, i *Instance) error {
	err := Await(ctx, i.Name+" to be ready", openTimeout, func(ctx context.Context) error {
		if err := i.dial(ctx); err != nil {
			return err
		}
		return i.Envoy.Ready(ctx)
	})
	if err != nil {
		return errors.Join(err, m.describe(ctx, i))
	}
	return nil
}

// Launch starts an instance and waits only until its Envoy runs: it is for those
// that shall get no identity.
func (m *Mesh) Launch(ctx context.Context, s Service) (*Instance, error) {
	m.shop.mu.Lock()
	if m.shop.instances == nil {
		m.shop.instances, m.shop.number = make(map[string][]*Instance), make(map[string]int)
	}
	m.shop.number[s.Name]++
	i := &Instance{Service: s, Name: fmt.Sprintf("%s-%d", s.Name, m.shop.number[s.Name])}
	m.shop.instances[s.Name] = append(m.shop.instances[s.Name], i)
	m.shop.mu.Unlock()

	if s.Upstream != "" {
		if err := m.writeEndpoints(s.Upstream); err != nil { // Envoy wants the file to be there
			return i, err
		}
	}
	dir := m.path("services", i.Name)
	if err := m.prepare(dir, i); err != nil {
		return i, err
	}
	labels := map[string]string{Label: m.Run}
	env := append([]string{
		"SHOP_SERVICE=" + s.Name, "SHOP_INSTANCE=" + i.Name, "SHOP_STATS=/run/shop/stats.sock",
	}, s.Env...)
	if s.Upstream != "" {
		env = append(env, fmt.Sprintf("SHOP_UPSTREAM=http://127.0.0.1:%d/", firstLocalPort))
	}
	var err error
	i.App, err = m.Engine.Run(ctx, engine.Spec{
		Name: m.Run + "-" + i.Name, Image: m.appDigest, Command: s.Args, Env: env, Labels: labels,
		User: containerUser, Network: m.Run, Mounts: []string{dir + "/app:/run/shop"},
	})
	if err != nil {
		return i, err
	}
	c, err := m.Engine.Inspect(ctx, i.App)
	if err != nil {
		return i, err
	}
	i.Address = c.Address
	maps.Copy(labels, map[string]string{"app": s.Name, "team": "shop"})
	maps.Copy(labels, s.Labels)
	i.Sidecar, err = m.Engine.Run(ctx, engine.Spec{
		Name: m.Run + "-" + i.Name + "-sidecar", Image: m.sidecarDigest, Labels: labels, User: containerUser,
		Command: []string{"--config-path", "/etc/envoy/sidecar.yaml", "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"},
		Network: "container:" + i.App,
		Mounts: []string{
			dir + "/etc:/etc/envoy:ro", m.path("endpoints") + ":/etc/envoy/endpoints:ro",
			dir + "/sidecar:/run/envoy", filepath.Dir(m.AgentSocket()) + ":/run/meshid:ro",
		},
	})
	if err != nil {
		return i, err
	}
	err = Await(ctx, "the sidecar of "+i.Name, openTimeout, func(ctx context.Context) error {
		_, err := i.Envoy.Stats(ctx, "^none$")
		return err
	})
	if err != nil {
		return i, errors.Join(err, m.describe(ctx, i))
	}
	return i, nil
}

// prepare writes what an instance's containers find in their mounts.
func (m *Mesh) prepare(dir string, i *Instance) error {
	i.Envoy = Envoy{client: unixClient(filepath.Join(dir, "sidecar", "admin.sock"))}
	i.statsSocket = filepath.Join(dir, "app", "stats.sock")
	i.stats = unixClient(i.statsSocket)
	if err := os.MkdirAll(filepath.Join(dir, "etc", "endpoints"), 0o755); err != nil { //nolint:gosec // read by another user
		return err
	}
	for _, d := range []string{"sidecar", "app"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return err
		}
		if err := os.Chown(filepath.Join(dir, d), containerUID, containerUID); err != nil {
			return err
		}
	}
	b := Bootstrap{
		Service: i.Service.Name, Instance: i.Name, SDS: m.SDS,
		AgentSocket: "/run/meshid/" + filepath.Base(m.AgentSocket()), AdminSocket: "/run/envoy/admin.sock",
		EndpointsDir: "/etc/envoy/endpoints", InboundAddress: "0.0.0.0", InboundPort: inboundPort, AppPort: appPort,
		ConnectionLife: time.Hour, RequestsPerConnection: m.RequestsPerConnection,
	}
	if i.Service.SDS != "" {
		b.SDS = i.Service.SDS
	}
	for _, c := range i.Service.Clients {
		b.AllowedClients = append(b.AllowedClients, m.ID(c))
	}
	if u := i.Service.Upstream; u != "" {
		b.Upstreams = []Upstream{{Service: u, ServerID: m.ID(u), LocalPort: firstLocalPort}}
	}
	var text bytes.Buffer
	if err := b.Write(&text); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "etc", "sidecar.yaml"), text.Bytes(), 0o644) //nolint:gosec // read by another user
}

// Instances returns the instances of a service.
func (m *Mesh) Instances(service string) []*Instance {
	m.shop.mu.Lock()
	defer m.shop.mu.Unlock()
	return slices.Clone(m.shop.instances[service])
}

// All returns the instances of all services, the customer first.
func (m *Mesh) All() []*Instance {
	m.shop.mu.Lock()
	defer m.shop.mu.Unlock()
	var all []*Instance
	for _, s := range chain {
		all = append(all, m.shop.instances[s.Name]...)
	}
	for _, name := range slices.Sorted(maps.Keys(m.shop.instances)) {
		if !slices.ContainsFunc(chain, func(s Service) bool { return s.Name == name }) {
			all = append(all, m.shop.instances[name]...)
		}
	}
	return all
}

// Scale changes how many instances of a service of the shop there are.
func (m *Mesh) Scale(ctx context.Context, service string, n int) error {
	k := slices.IndexFunc(chain, func(s Service) bool { return s.Name == service })
	if k < 0 {
		return fmt.Errorf("scale %s: there is no such service", service)
	}
	for have := len(m.Instances(service)); have < n; have++ {
		if _, err := m.Add(ctx, chain[k]); err != nil {
			return err
		}
	}
	for have := len(m.Instances(service)); have > n; have-- {
		if err := m.Drop(ctx, m.Instances(service)[have-1]); err != nil {
			return err
		}
	}
	return nil
}

// Drop takes an instance out of service as an orchestrator does: first nobody
// is sent to it any more, then what is open is finished, then it is stopped.
func (m *Mesh) Drop(ctx context.Context, i *Instance) error {
	m.shop.mu.Lock()
	m.shop.instances[i.Service.Name] = slices.DeleteFunc(m.shop.instances[i.Service.Name], func(x *Instance) bool { return x == i })
	m.shop.mu.Unlock()
	if err := m.publish(ctx, i.Service.Name); err != nil {
		return err
	}
	err := Await(ctx, "the open requests of "+i.Name, time.Minute, func(ctx context.Context) error {
		stats, err := i.Envoy.Stats(ctx, `http\.inbound\.downstream_rq_active`)
		if err != nil {
			return err
		}
		if n := stats["http.inbound.downstream_rq_active"]; n > 0 {
			return fmt.Errorf("%d are open", n)
		}
		return nil
	})
	if err != nil {
		return err
	}
	last, err := i.Envoy.Traffic(ctx)
	if err != nil {
		return err
	}
	m.shop.mu.Lock()
	m.shop.departed = m.shop.departed.plus(last)
	m.shop.mu.Unlock()
	return m.Discard(ctx, i)
}

// Discard removes the containers of an instance at once.
func (m *Mesh) Discard(ctx context.Context, i *Instance) error {
	m.shop.mu.Lock()
	m.shop.instances[i.Service.Name] = slices.DeleteFunc(m.shop.instances[i.Service.Name], func(x *Instance) bool { return x == i })
	m.shop.mu.Unlock()
	var errs []error
	for _, id := range []string{i.App, i.Sidecar} {
		if id != "" {
			errs = append(errs, m.Engine.Remove(ctx, id))
		}
	}
	return errors.Join(errs...)
}

// publish writes where the instances of a service are, and waits until the
// sidecars of its clients have taken that in.
func (m *Mesh) publish(ctx context.Context, service string) error {
	if err := m.writeEndpoints(service); err != nil {
		return err
	}
	want := uint64(len(m.Instances(service)))
	for _, client := range m.All() {
		if client.Service.Upstream != service || client.Sidecar == "" {
			continue
		}
		name := "cluster." + service + ".membership_total"
		err := Await(ctx, "the endpoints of "+service+" at "+client.Name, time.Minute, func(ctx context.Context) error {
			stats, err := client.Envoy.Stats(ctx, name)
			if err == nil && stats[name] != want {
				err = fmt.Errorf("it knows %d, want %d", stats[name], want)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *Mesh) writeEndpoints(service string) error {
	var endpoints []Endpoint
	for _, i := range m.Instances(service) {
		if i.Address != "" {
			endpoints = append(endpoints, Endpoint{Address: i.Address, Port: inboundPort})
		}
	}
	m.shop.mu.Lock()
	m.shop.version++
	version := m.shop.version
	m.shop.mu.Unlock()
	return writeFileAtomically(m.path("endpoints"), service+".yaml", func(w io.Writer) error {
		return WriteEndpoints(w, service, version, endpoints)
	})
}

// writeFileAtomically writes dir/name so that a reader sees the old or the new
// text; Envoy watches for the move.
func writeFileAtomically(dir, name string, write func(io.Writer) error) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // read by another user
		return err
	}
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	if err := errors.Join(write(f), f.Chmod(0o644), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), filepath.Join(dir, name))
}

// Sales is what the customer has counted.
type Sales struct {
	Requests  uint64            `json:"requests"`
	Failures  uint64            `json:"failures"`
	LastError string            `json:"last_error"`
	Instances map[string]uint64 `json:"instances"` // answers by instance
}

// Sales asks the customer.
func (m *Mesh) Sales(ctx context.Context) (Sales, error) {
	var s Sales
	customers := m.Instances("customer")
	if len(customers) == 0 {
		return s, errors.New("the shop is not open")
	}
	if err := get(ctx, customers[0].stats, "/", &s); err != nil {
		return s, fmt.Errorf("ask the customer: %w", err)
	}
	return s, nil
}

// Attempt is one way in that an intruder has tried.
type Attempt struct {
	Name    string `json:"name"`
	Tries   uint64 `json:"tries"`
	GotIn   uint64 `json:"got_in"`
	Refusal string `json:"refusal"`
}

// Attempts asks an intruder.
func (i *Instance) Attempts(ctx context.Context) ([]Attempt, error) {
	var a []Attempt
	if err := get(ctx, i.stats, "/", &a); err != nil {
		return nil, fmt.Errorf("ask %s: %w", i.Name, err)
	}
	return a, nil
}

// Those who must stay outside.
const (
	// Burglar has the right image, but another team's label: no entry matches.
	Burglar = "burglar"
	// Gossip has an identity of its own, which nobody has allowed to call.
	Gossip = "gossip"
)

// Intruders are the names of those who must stay outside.
var Intruders = []string{Burglar, Gossip}

// Intrude starts the intruders; all of them try an instance of stock.
func (m *Mesh) Intrude(ctx context.Context) error {
	m.Progress("letting in two intruders: one without an identity, one that nobody has allowed")
	stock := m.Instances("stock")
	if len(stock) == 0 {
		return errors.New("the shop is not open")
	}
	args := []string{"intrude", stock[0].Address + ":" + strconv.Itoa(inboundPort)}
	for name, labels := range map[string]map[string]string{
		Burglar: {"team": "thieves", "app": "orders"},
		Gossip:  {},
	} {
		_, err := m.Launch(ctx, Service{
			Name: name, Upstream: "stock", Args: args, Labels: labels, Statistics: true,
			Env: []string{"SHOP_CLAIM=" + m.ID("orders")},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Sell waits until the customer has sent n more requests.
func (m *Mesh) Sell(ctx context.Context, n uint64) error {
	before, err := m.Sales(ctx)
	if err != nil {
		return err
	}
	return Await(ctx, fmt.Sprintf("%d requests", n), time.Minute, func(ctx context.Context) error {
		now, err := m.Sales(ctx)
		if err == nil && now.Requests < before.Requests+n {
			err = fmt.Errorf("%d were sent", now.Requests-before.Requests)
		}
		return err
	})
}

// Renew orders all leaves to be renewed within a time. A node agent that is just
// replacing its connection does not hear of it, so it is ordered until one does.
func (m *Mesh) Renew(within time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		return Await(ctx, "a node to renew its leaves", time.Minute, func(ctx context.Context) error {
			answer, err := m.Admin.RenewSVIDs(ctx, &adminv1.RenewSVIDsRequest{Within: durationpb.New(within)})
			if err == nil && answer.GetNodes() == 0 {
				err = errors.New("no node is connected")
			}
			return err
		})
	}
}

// RotateIntermediate replaces the intermediate and has all leaves renewed.
func (m *Mesh) RotateIntermediate(within time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := m.Admin.RotateIntermediate(ctx, &adminv1.RotateIntermediateRequest{Within: durationpb.New(within)})
		return err
	}
}

// RotateAll calls rotate, and waits until every sidecar that had a certificate
// serves another one; it does not look at those in except.
func (m *Mesh) RotateAll(ctx context.Context, within time.Duration, rotate func(context.Context) error, except ...*Instance) error {
	before := make(map[*Instance]string)
	for _, i := range m.All() {
		if slices.Contains(except, i) {
			continue
		}
		c, err := i.Envoy.Certificate(ctx)
		if err != nil {
			return err
		}
		if c != nil {
			before[i] = c.Serial
		}
	}
	if err := rotate(ctx); err != nil {
		return err
	}
	for i, serial := range before {
		err := Await(ctx, "the new certificate of "+i.Name, within, func(ctx context.Context) error {
			c, err := i.Envoy.Certificate(ctx)
			if err == nil && (c == nil || c.Serial == serial) {
				err = fmt.Errorf("it still serves %s", serial)
			}
			return err
		})
		if err != nil {
			return errors.Join(err, m.describe(ctx, i))
		}
	}
	return nil
}

// Figures is what a run has come to.
type Figures struct {
	Sales
	Traffic
}

// Figures sums up what customer and sidecars have counted, those that are gone
// included.
func (m *Mesh) Figures(ctx context.Context) (Figures, error) {
	sales, err := m.Sales(ctx)
	if err != nil {
		return Figures{}, err
	}
	m.shop.mu.Lock()
	f := Figures{Sales: sales, Traffic: m.shop.departed}
	m.shop.mu.Unlock()
	for _, i := range m.All() {
		t, err := i.Envoy.Traffic(ctx)
		if err != nil {
			return f, fmt.Errorf("figures of %s: %w", i.Name, err)
		}
		f.Traffic = f.plus(t)
	}
	return f, nil
}

// describe returns what an instance's containers and the agent say, as an
// error, for somebody who must find out why something did not come up.
func (m *Mesh) describe(ctx context.Context, i *Instance) error {
	app, _ := m.Engine.Logs(ctx, i.App, 10)
	sidecar, _ := m.Engine.Logs(ctx, i.Sidecar, 20)
	return fmt.Errorf("%s says:\n%s\nits sidecar says:\n%s\nthe node agent says:\n%s", i.Name, app, sidecar, m.Agent.Tail())
}
