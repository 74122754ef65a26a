package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	adminv1 "github.com/meshid/meshid/proto/admin/v1"
	entryv1 "github.com/meshid/meshid/proto/entry/v1"

	"github.com/meshid/meshid/pkg/identity"
)

// DeclaredPrefix begins the names of entries that are declared elsewhere, such as in
// Kubernetes, and kept in force from there. The admin API shows them, and changes none.
const DeclaredPrefix = "k8s/"

// Declare puts the entries of one source into force, in one change: those that are not
// among wanted any more are deleted. The caller knows all that the source has. Every
// name begins with DeclaredPrefix, source and a slash. An entry that is not valid is in
// rejected, by its name; what was in force under that name stays.
//
// Changes are recorded like those of the admin API, with actor as who made them. It may
// be called concurrently; with an error, nothing was put into force, while what is not
// wanted any more may have been deleted.
func (s *Server) Declare(ctx context.Context, actor, source string, wanted []*entryv1.Entry) (rejected map[string]*identity.EntryError, err error) {
	prefix := DeclaredPrefix + source + "/"
	c := &caller{requestID: newRequestID(), actor: actor, began: time.Now()}
	s.entryMu.Lock()
	defer s.entryMu.Unlock()
	current := s.registry.Entries()
	rejected = make(map[string]*identity.EntryError)
	_, errs := s.compileAll(wanted)
	req := new(adminv1.ApplyEntriesRequest)
	named := make(map[string]bool, len(wanted))
	for i, e := range wanted {
		if !strings.HasPrefix(e.GetName(), prefix) {
			return nil, fmt.Errorf("declare entries of %s: entry %q does not begin with %s", source, e.GetName(), prefix)
		}
		named[e.GetName()] = true
		problem, invalid := errors.AsType[*identity.EntryError](errs[i])
		switch {
		case invalid:
			rejected[e.GetName()] = problem
		case errs[i] != nil:
			return nil, fmt.Errorf("declare entries of %s: %w", source, errs[i])
		case e.GetAdmin():
			rejected[e.GetName()] = &identity.EntryError{Entry: e.GetName(), Fields: []identity.FieldError{{
				Field: "admin", Message: "an administrator of the CA cannot be declared", Hint: "apply the entry with: ca entry apply",
			}}}
		default:
			req.Entries = append(req.Entries, e)
		}
	}
	var deleted []*change
	for _, name := range current.Names() {
		if strings.HasPrefix(name, prefix) && !named[name] {
			before, _ := current.Proto(name)
			deleted = append(deleted, &change{action: actionDeleted, before: before})
		}
	}
	changes, err := s.plan(current, req)
	if err != nil {
		// What was taken back does not stay in force because the others are too many.
		if len(deleted) > 0 {
			_, _, failed := s.commit(ctx, c, current, deleted)
			err = errors.Join(err, failed)
		}
		return nil, err
	}
	changes = append(changes, deleted...)
	slices.SortFunc(changes, func(a, b *change) int { return strings.Compare(a.name(), b.name()) })
	if _, _, err := s.commit(ctx, c, current, changes); err != nil {
		return nil, err
	}
	return rejected, nil
}

// declared refuses a change of the admin API to what is declared elsewhere.
func declared(names []string) error {
	i := slices.IndexFunc(names, func(name string) bool { return strings.HasPrefix(name, DeclaredPrefix) })
	if i < 0 {
		return nil
	}
	return fail(kindConflict, fmt.Sprintf("entry %q is declared in Kubernetes, and would be put back: change it there (kubectl edit registrationentry)", truncate(names[i])), nil)
}

// InForce says on how many of the connected nodes everything is in force that was
// changed up to a revision.
func (s *Server) InForce(revision uint64) (nodes, connected int) {
	for _, session := range s.hub.all() {
		connected++
		if session.inForce().revision >= revision {
			nodes++
		}
	}
	return nodes, connected
}

// EntryRevision returns the revision that last changed an entry that is in force, and
// false if there is none of this name.
func (s *Server) EntryRevision(name string) (revision uint64, ok bool) {
	e, ok := s.registry.Entries().Set.Get(name)
	if !ok {
		return 0, false
	}
	return e.Revision(), true
}
