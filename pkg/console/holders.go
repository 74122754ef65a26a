package console

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/meshid/meshid/pkg/ledger/search"
)

// holder is a valid X.509-SVID.
type holder struct {
	Index                     uint64
	Path                      string
	SPIFFEID, Node, Authority string
	Instance, State           string
	NotAfter                  time.Time
	Serial                    []byte
}

type holdersPage struct {
	Searchable bool
	// What is asked for: those that are set have to hold.
	Root, Authority, Identity, Node string
	Problem                         string
	Below                           int // intermediates that chain to the root
	All                             bool
	Rows                            []holder
	Other, Next                     string // addresses
}

// holders shows who holds valid certificates.
func (c *Console) holders(r *http.Request, v *view) error {
	q := r.URL.Query()
	p := &holdersPage{All: q.Has("all")}
	v.Title, v.Template, v.Body = "Holders", "holders", p
	asked := false
	for name, into := range map[string]*string{"root": &p.Root, "authority": &p.Authority, "identity": &p.Identity, "node": &p.Node} {
		if *into = strings.TrimSpace(q.Get(name)); len(*into) > maxFilter {
			*into = ""
		}
		asked = asked || *into != ""
	}
	if !asked {
		return fmt.Errorf("the address does not say whose certificates are wanted: %w", errNotFound)
	}
	wanted := search.Holders{SPIFFEID: p.Identity, Node: p.Node, At: v.Now, Current: !p.All, Limit: pageRows}
	if n, err := fmt.Sscanf(q.Get("after"), "%d.%d", &wanted.After.Key, &wanted.After.Record); err == nil && n == 2 {
		wanted.After.Valid = true
	}
	v.Live = !wanted.After.Valid
	if p.Authority != "" {
		wanted.Authorities = []string{p.Authority}
	}
	var err error
	p.Searchable, err = c.ask(r, v, func(ctx context.Context, x Index) error {
		if p.Root != "" {
			id, below, err := c.cfg.Authorities.Below(ctx, p.Root)
			if err != nil {
				return err
			}
			if p.Root, p.Below = id, len(below); len(below) == 0 {
				return nil
			}
			wanted.Authorities = below
		}
		found, next, err := x.Who(ctx, wanted)
		if err != nil {
			return err
		}
		for _, f := range found {
			rec := f.Record
			p.Rows = append(p.Rows, holder{
				Index: f.Index, Path: recordPath(f.Index), SPIFFEID: rec.GetSpiffeId(), Node: rec.GetNode().GetId(), Authority: rec.GetAuthority().GetId(),
				Instance: rec.GetInstance(), State: f.State.String(), NotAfter: rec.GetCertificate().GetNotAfter().AsTime(), Serial: rec.GetCertificate().GetSerial(),
			})
		}
		if next.Valid {
			q.Set("after", fmt.Sprintf("%d.%d", next.Key, next.Record))
			p.Next = prefix + "/holders?" + q.Encode()
		}
		return nil
	})
	if errors.Is(err, search.ErrNoRoot) {
		p.Problem, v.status = "That names no root, or more than one.", http.StatusNotFound
		return nil
	}
	other := url.Values{}
	for name, value := range map[string]string{"root": p.Root, "authority": p.Authority, "identity": p.Identity, "node": p.Node} {
		if value != "" {
			other.Set(name, value)
		}
	}
	if !p.All {
		other.Set("all", "1")
	}
	p.Other = prefix + "/holders?" + other.Encode()
	return err
}

// holdersLink is the address of a list of holders.
func holdersLink(by, name string) string {
	return prefix + "/holders?" + url.Values{by: {name}}.Encode()
}
