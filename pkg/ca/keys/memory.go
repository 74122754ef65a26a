package keys

import (
	"context"
	"crypto"
	"fmt"
	"sync"
)

const memoryScheme = "memory"

// Memory returns a Store whose keys end with the process. It suits tests and
// trials: a root that is kept in it does not survive a restart.
func Memory() Store { return &memory{keys: make(map[string]crypto.Signer)} }

type memory struct {
	mu   sync.Mutex // guards keys
	keys map[string]crypto.Signer
}

func (m *memory) Create(ctx context.Context, name string) (crypto.Signer, string, error) {
	if err := ctx.Err(); err != nil {
		return nil, "", err
	}
	if err := checkName(name); err != nil {
		return nil, "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, taken := m.keys[name]; taken {
		return nil, "", fmt.Errorf("create key %q in memory: %w", name, ErrExists)
	}
	signer, err := P256.Generate()
	if err != nil {
		return nil, "", err
	}
	m.keys[name] = signer
	return signer, memoryScheme + ":" + name, nil
}

func (m *memory) Open(ctx context.Context, ref string) (crypto.Signer, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	name, err := cutReference(memoryScheme, ref)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	signer, ok := m.keys[name]
	if !ok {
		return nil, fmt.Errorf("open key %q in memory: %w", name, ErrNotFound)
	}
	return signer, nil
}
